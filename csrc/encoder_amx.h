// The stack on AMX tiles: the part of csrc/encoder.cpp that stands in for its own blocks where the
// instruction set is amx. Included there only.
//
// All sequences of a chunk, ragged or not, are the rows of one product with a weight. Queries of the
// left padding are zeros and share one result, so that only the others are multiplied. In the last
// block only the last position has a query, q = W_q h: its score with the key W_k h_t + b_k is
// (W_k^T q) . h_t plus what is the same for all t, and its output W_v (sum_t p_t h_t) + b_v, head by
// head. So neither keys nor values are computed.

template <int PLANES>
void pack_as(const float* weight, int64_t row, int64_t column, int64_t depth, int64_t columns,
             uint16_t* planes) {
    if (column == 1) {
        amx_split<PLANES, false, STRIPS_INSIDE>(weight, row, columns, depth, planes);
    } else {
        amx_split<PLANES, false, DEPTH_INSIDE>(weight, column, columns, depth, planes);
    }
}

void pack_planes(const float* weight, int64_t row, int64_t column, int64_t depth, int64_t columns,
                 int count, uint16_t* planes) {
    const auto pack = count == 1 ? pack_as<1> : count == 2 ? pack_as<2> : pack_as<3>;
    pack(weight, row, column, depth, columns, planes);
}

// c = a weight + bias, or c += ... : a is `planes`. `next` are the weights used afterwards.
template <int PLANES>
FMREC_INLINE void amx_linear(const uint16_t* planes, const PackedLinear* w, bool add, float* c,
                             int64_t c_row, int64_t rows, const uint16_t* next) {
    const AmxProduct p = {planes, w->planes, w->bias, nullptr, add, c, c_row, w->depth, next};
    amx_multiply<PLANES>(&p, rows, round_up(w->columns, UNIT));
}

template <int PLANES>
FMREC_INLINE void split_rows(const Encoder* e, const float* x, int64_t rows, uint16_t* planes) {
    amx_split<PLANES, true, DEPTH_INSIDE>(x, row_stride(e->channels), rows, e->channels, planes);
}

FMREC_INLINE void norm_rows(const Encoder* e, const PackedNorm* n, const float* x, float* out,
                            int64_t rows) {
    const LayerNorm norm = {n->weight, n->bias, e->channels, round_up(e->channels, UNIT), e->rms};
    layer_norm(&norm, x, out, row_stride(e->channels), rows);
}

// x += feed_forward(norm(x)) on `rows` rows; normed is overwritten. `after`: the weights used next.
template <int PLANES>
void amx_feed_forward(const Encoder* e, const PackedBlock* b, const Workspace* w, float* x,
                      int64_t rows, float* normed, const uint16_t* after) {
    const int64_t stride = row_stride(e->channels), padded = round_up(e->channels, UNIT);
    norm_rows(e, &b->norm2, x, normed, rows);
    split_rows<PLANES>(e, normed, rows, w->planes);
    const int64_t features = b->inner.columns, all = round_up(features, UNIT);
    for (int64_t first = 0; first < features; first += INNER) {
        const int64_t columns = all - first < INNER ? all - first : INNER;
        const int64_t depth = features - first < INNER ? features - first : INNER;
        const int64_t depth_tiles = round_to(depth, 32) / 32;
        const float* bias = b->inner.bias + first;
        uint16_t* inner = w->inner_planes;
        const uint16_t* outer =
            b->outer.planes + first / INNER * amx_columns_size(INNER, e->channels, PLANES);
        // A block's columns are one tile of depth of the next product.
        amx_blocks<PLANES, PLANES>(
            w->planes, b->inner.planes + amx_columns_size(e->channels, first, PLANES),
            e->channels, rows, columns,
            [=](auto pieces, int64_t row, int64_t column, const auto& sums, int64_t width) {
                constexpr int ROWS = decltype(pieces)::count;
                int64_t spacing;
                uint16_t* out = row_of_planes<PLANES>(inner, rows, depth_tiles, row, column / 32,
                                                      &spacing);
                f32v x[2 * ROWS];
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; ++r) {
                    x[2 * r] = sums.at(r, 0) + load(bias + column);
                    x[2 * r + 1] = broadcast(0.0f);
                    if (width > 16) {
                        x[2 * r + 1] = sums.at(r, 16) + load(bias + column + 16);
                    }
                }
                gelu_all<2 * ROWS>(x);
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; ++r) {
                    split_pairs<PLANES>(x[2 * r], x[2 * r + 1], out + 32 * r, spacing);
                }
            },
            outer);
        const uint16_t* next = after;
        if (first + INNER < features) {
            next = b->inner.planes + amx_columns_size(e->channels, first + INNER, PLANES);
        }
        const AmxProduct p = {inner, outer, first == 0 ? b->outer.bias : nullptr, nullptr,
                              true,  x,     stride, depth, next};
        amx_multiply<PLANES>(&p, rows, padded);
    }
}

FMREC_INLINE void add_row(float* target, const float* source, int64_t columns) {
    for (int64_t j = 0; j < columns; j += FLOATS) {
        store(target + j, load(target + j) + load(source + j));
    }
}

// Padded positions that a sequence begins with, whose queries attend uniformly: without a bias.
FMREC_INLINE int64_t padding_of(const Encoder* e, const Ragged* r, const float* mask) {
    int64_t padding = 0;
    while (!r && padding < e->length && mask[padding] == 0.0f) ++padding;
    return padding;
}

// The norm of a chunk's rows, their keys and their values.
template <int PLANES>
FMREC_INLINE void amx_keys_and_values(const Encoder* e, const PackedBlock* b, const Workspace* w,
                                      const float* x, int64_t rows) {
    const int64_t stride = row_stride(e->channels);
    norm_rows(e, &b->norm1, x, w->normed, rows);
    split_rows<PLANES>(e, w->normed, rows, w->planes);
    amx_linear<PLANES>(w->planes, &b->key, false, w->key, stride, rows, b->value.planes);
    // Whole sequences of L rows: a ragged group is never rotated.
    for (int64_t row = 0; e->rotary && row < rows; row += e->length) {
        rotate_rows(e, w->key + row * stride, e->length, 0);
    }
    amx_linear<PLANES>(w->planes, &b->value, false, w->value, stride, rows,
                       b->key_back ? b->output.planes : b->query.planes);
}

// x = block(x) at all positions of the sequences first .. end - 1, a chunk; x is the group's.
template <int PLANES>
void amx_block(const Encoder* e, const PackedBlock* b, const Workspace* w, float* x,
               const float* mask, const Ragged* r, int64_t first, int64_t end) {
    const int64_t stride = row_stride(e->channels), padded = round_up(e->channels, UNIT);
    const int64_t base = row_of(e, r, first), rows = row_of(e, r, end) - base;
    x += base * stride;
    mask += base;
    amx_keys_and_values<PLANES>(e, b, w, x, rows);
    // The rows that have queries move together.
    int64_t queries = 0;
    for (int64_t s = first; s < end; ++s) {
        const int64_t row = row_of(e, r, s) - base, past = row_of(e, r, s + 1) - base;
        for (int64_t i = row + padding_of(e, r, mask + row); i < past; ++i, ++queries) {
            if (i != queries) copy_row(w->normed + queries * stride, w->normed + i * stride, padded);
        }
    }
    if (queries < rows) split_rows<PLANES>(e, w->normed, queries, w->planes);
    amx_linear<PLANES>(w->planes, &b->query, false, w->query, stride, queries, b->output.planes);
    // What the heads mix, and the mean of the values for the padding, takes the norm's place.
    float* mixed = w->normed;
    float* query = w->query;
    for (int64_t s = first; s < end; ++s) {
        const int64_t row = row_of(e, r, s) - base, length = row_of(e, r, s + 1) - base - row;
        const int64_t padding = padding_of(e, r, mask + row);
        const float* value = w->value + row * stride;
        if (padding > 0) {
            mean_value(e, value, mixed);
            mixed += stride;
        }
        if (padding < length) {
            rotate_rows(e, query, length - padding, padding);
            const Attended a = {query,         mask + row + padding, length - padding,
                                w->key + row * stride, value,        length,
                                bias_of(r, s), mixed};
            attention(e, w, &a);
        }
        query += (length - padding) * stride;
        mixed += (length - padding) * stride;
    }
    const int64_t outputs = (mixed - w->normed) / stride;
    split_rows<PLANES>(e, w->normed, outputs, w->planes);
    if (queries == rows) {
        amx_linear<PLANES>(w->planes, &b->output, true, x, stride, rows, b->inner.planes);
    } else {
        amx_linear<PLANES>(w->planes, &b->output, false, w->query, stride, outputs, b->inner.planes);
        const float* y = w->query;
        for (int64_t s = first; s < end; ++s) {
            const int64_t row = row_of(e, r, s) - base, past = row_of(e, r, s + 1) - base;
            const int64_t padding = padding_of(e, r, mask + row);
            for (int64_t i = row; i < row + padding; ++i) add_row(x + i * stride, y, padded);
            if (padding > 0) y += stride;
            for (int64_t i = row + padding; i < past; ++i, y += stride) {
                add_row(x + i * stride, y, padded);
            }
        }
    }
    const PackedBlock* after = b + 1;  // the last one begins with its query
    amx_feed_forward<PLANES>(e, b, w, x, rows, w->normed,
                             after->key_back ? after->query.planes : after->key.planes);
}

// What the heads mix for the last positions' queries, in their place in last_mixed, without keys and
// values; for keys that are not rotated.
template <int PLANES>
void amx_mix_norms(const Encoder* e, const PackedBlock* b, const Workspace* w, const float* x,
                   const float* mask, const Ragged* r, int64_t count) {
    const int64_t stride = row_stride(e->channels), padded = round_up(e->channels, UNIT);
    const int64_t heads = e->heads, width = e->channels / heads, all = count * heads;
    const int64_t columns = round_up(heads, UNIT);
    const float log2e = 1.44269504f, scale = log2e / __builtin_sqrtf((float)width);
    // A row a head, zero beyond it; times W_k.
    for (int64_t i = 0; i < all; ++i) {
        float* row = w->by_head + i * stride;
        const int64_t head = i % heads * width;
        __builtin_memset(row, 0, (size_t)padded * sizeof(float));
        __builtin_memcpy(row + head, w->last_mixed + i / heads * stride + head,
                         (size_t)width * sizeof(float));
    }
    split_rows<PLANES>(e, w->by_head, all, w->planes);
    const AmxProduct back = {w->planes, b->key_back, nullptr, nullptr,
                             false,     w->turned,   stride,  e->channels, b->value.planes};
    amx_multiply<PLANES>(&back, all, padded);
    for (int64_t s = 0; s < count; ++s) {
        const int64_t row = row_of(e, r, s), length = row_of(e, r, s + 1) - row;
        norm_rows(e, &b->norm1, x + row * stride, w->normed, length);
        for (int64_t h = 0; h < columns; ++h) {
            w->factor[h] = h < heads ? mask[row + length - 1] * scale : 0.0f;
        }
        // Scores are kept positions by heads.
        transpose_scaled(w->turned + s * heads * stride, stride, heads, e->channels, w->factor,
                         w->transposed, columns);
        const Product scores = {w->normed, stride, 1, w->transposed, columns, nullptr,
                                nullptr, false, w->scores, columns, e->channels};
        multiply(&scores, length, columns);
        if (bias_of(r, s) != 0.0f) {
            for (int64_t h = 0; h < columns; ++h) w->scores[h] += bias_of(r, s) * log2e;
        }
        softmax_columns(w->scores, columns, length, columns, w->factor);
        const Product mean = {w->scores, 1, columns, w->normed, stride, nullptr, w->factor, false,
                              w->by_head + s * heads * stride, stride, length};
        multiply(&mean, heads, padded);
    }
    split_rows<PLANES>(e, w->by_head, all, w->planes);
    amx_linear<PLANES>(w->planes, &b->value, false, w->turned, stride, all, b->output.planes);
    for (int64_t i = 0; i < all; ++i) {
        const int64_t head = i % heads * width;
        __builtin_memcpy(w->last_mixed + i / heads * stride + head, w->turned + i * stride + head,
                         (size_t)width * sizeof(float));
    }
}

// The same with keys and values, rotated.
template <int PLANES>
void amx_mix_values(const Encoder* e, const PackedBlock* b, const Workspace* w, const float* x,
                    const float* mask, const Ragged* r, int64_t count) {
    const int64_t stride = row_stride(e->channels), length = e->length;
    for (int64_t first = 0, end = 0; first < count; first = end) {
        end = chunk_end(e, r, first, count);
        amx_keys_and_values<PLANES>(e, b, w, x + first * length * stride, (end - first) * length);
        for (int64_t s = first; s < end; ++s) {
            float* query = w->query;
            copy_row(query, w->last_mixed + s * stride, round_up(e->channels, UNIT));
            rotate_rows(e, query, 1, length - 1);
            const Attended a = {query, mask + (s + 1) * length - 1, 1,
                                w->key + (s - first) * length * stride,
                                w->value + (s - first) * length * stride, length,
                                bias_of(r, s), w->last_mixed + s * stride};
            attention(e, w, &a);
        }
    }
}

// The last block at the last positions of all sequences, [count, stride].
template <int PLANES>
void amx_last_block(const Encoder* e, const PackedBlock* b, const Workspace* w, const float* x,
                    const float* mask, const Ragged* r, int64_t count, float* last) {
    const int64_t stride = row_stride(e->channels), padded = round_up(e->channels, UNIT);
    for (int64_t s = 0; s < count; ++s) {
        copy_row(last + s * stride, x + (row_of(e, r, s + 1) - 1) * stride, padded);
    }
    norm_rows(e, &b->norm1, last, w->last_normed, count);
    split_rows<PLANES>(e, w->last_normed, count, w->planes);
    amx_linear<PLANES>(w->planes, &b->query, false, w->last_mixed, stride, count,
                       e->rotary ? b->key.planes : b->key_back);
    if (e->rotary) {
        amx_mix_values<PLANES>(e, b, w, x, mask, r, count);
    } else {
        amx_mix_norms<PLANES>(e, b, w, x, mask, r, count);
    }
    split_rows<PLANES>(e, w->last_mixed, count, w->planes);
    amx_linear<PLANES>(w->planes, &b->output, true, last, stride, count, b->inner.planes);
    amx_feed_forward<PLANES>(e, b, w, last, count, w->last_mixed, nullptr);
}

template <int PLANES>
void run_planes(const Encoder* e, float* x, const float* mask, const Ragged* r, int64_t count,
                float* last, float* tapped, float* scratch) {
    const TileState tiles;
    Workspace w;
    lay_out(e, count, scratch, &w);
    const int64_t stride = row_stride(e->channels), padded = round_up(e->channels, UNIT);
    for (int64_t n = 0; n + 1 < e->num_blocks; ++n) {
        for (int64_t s = 0, end = 0; s < count; s = end) {
            end = chunk_end(e, r, s, count);
            amx_block<PLANES>(e, e->blocks + n, &w, x, mask, r, s, end);
        }
        for (int64_t s = 0; n == e->tap && s < count; ++s) {
            copy_row(tapped + s * stride, x + (row_of(e, r, s + 1) - 1) * stride, padded);
        }
    }
    amx_last_block<PLANES>(e, e->blocks + e->num_blocks - 1, &w, x, mask, r, count, last);
    for (int64_t s = 0; e->tap == e->num_blocks - 1 && s < count; ++s) {
        copy_row(tapped + s * stride, last + s * stride, padded);
    }
}

void run_ragged(const Encoder* e, float* x, const float* mask, const Ragged* r, int64_t count,
                float* last, float* tapped, float* scratch) {
    const auto run = e->planes == 1 ? run_planes<1> : e->planes == 2 ? run_planes<2> : run_planes<3>;
    run(e, x, mask, r, count, last, tapped, scratch);
}
