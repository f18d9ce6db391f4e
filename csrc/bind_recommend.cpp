#include <cmath>
#include <numeric>
#include <vector>

#include "bind_encoder.h"
#include "bind_item_ranking.h"
#include "euler_sampler.h"
#include "memory.h"
#include "picard_sweep.h"
#include "recommend.h"
#include "sequence_groups.h"

namespace fmrec {
namespace {

// All steps at once, as fmrec_fast/picard.py: from the straight way to the first step's prediction,
// sweeps over all points of a row's trajectory until its residual is at most `tolerance`.
void picard(const EulerSampler& a, const PicardSweepKernels& kernels, double tolerance, bool tied,
            int num_threads) {
    const std::int64_t channels = a.encoder.channels, steps = a.steps, size = a.batch * channels;
    const Floats memory = allocate_floats(2 * steps * size, false);
    float* const points = memory.get();  // [B, q, D]
    float* const predictions = points + steps * size;
    PicardSweep sweep{};
    static_cast<SamplerNetwork&>(sweep) = a;
    sweep.x = a.z0;
    sweep.out = predictions;
    sweep.steps = 1;
    run_sequences(kernels, sweep, 1, tied, num_threads);
    std::vector<double> before(static_cast<std::size_t>(a.batch));
    for (std::int64_t b = 0; b < a.batch; ++b) {
        double squares = 0.0;
        for (std::int64_t j = 0; j < channels; ++j) {
            const std::int64_t at = b * channels + j;
            const float z0 = a.z0[at], velocity = predictions[at] - z0;
            for (std::int64_t i = 0; i < steps; ++i) {
                points[(b * steps + i) * channels + j] =
                    z0 + velocity * (static_cast<float>(i) / static_cast<float>(steps));
            }
            a.out[at] = z0 + velocity;
            squares += static_cast<double>(velocity) * velocity;
        }
        before[static_cast<std::size_t>(b)] = std::sqrt(squares);
    }
    sweep.x = points;
    sweep.steps = steps;
    std::vector<bool> settled(static_cast<std::size_t>(a.batch), false);
    bool all = false;
    // After q - 1 sweeps the result is exact.
    for (std::int64_t n = 1; n < steps && !all; ++n) {
        run_sequences(kernels, sweep, steps, tied, num_threads);
        all = true;
        for (std::int64_t b = 0; b < a.batch; ++b) {
            const std::size_t row = static_cast<std::size_t>(b);
            if (settled[row]) continue;
            double squares = 0.0, moved = 0.0;
            for (std::int64_t j = 0; j < channels; ++j) {
                const std::int64_t at = b * channels + j;
                const float z0 = a.z0[at];
                float sum = 0.0f;
                for (std::int64_t i = 0; i < steps; ++i) {
                    const std::int64_t p = (b * steps + i) * channels + j;
                    points[p] = z0 + sum / static_cast<float>(steps);
                    sum += predictions[p] - z0;
                }
                const float end = z0 + sum / static_cast<float>(steps);
                moved += static_cast<double>(end - a.out[at]) * (end - a.out[at]);
                squares += static_cast<double>(end) * end;
                a.out[at] = end;
            }
            const double change = std::sqrt(moved);
            const double residual = moved / (before[row] * std::sqrt(squares));
            before[row] = change;
            // Not so where it is NaN: then sweeps go on, as many as there are.
            settled[row] = change == 0.0 || residual <= tolerance;
            all = all && settled[row];
        }
    }
}

Start read_start(const std::string& name) {
    if (name == "noise") return Start::NOISE;
    if (name == "anchor") return Start::ANCHOR;
    if (name == "anchor in history") return Start::ANCHOR_IN_HISTORY;
    throw py::value_error("start must be 'noise', 'anchor' or 'anchor in history', got '" + name +
                          "'");
}

// What leads from ids to the sampled embeddings, and the arrays, kept while it runs.
struct Sampling {
    EulerSampler a{};
    Recommend r{};
    py::array norm_weight, norm_bias, items, embedded_weight, embedded_bias, ids, taus, rows;
    std::vector<std::int64_t> numbered;  // rows where none are given
    double tolerance;
    bool tied;
    int num_threads;
};

// Checks the arguments that `sample` and `recommend` share.
void read_sampling(Sampling& s, const PackedEncoder& packed, const py::object& norm_weight,
                   const py::object& norm_bias, const py::object& items,
                   const py::object& embedded_weight, const py::object& embedded_bias,
                   const py::object& ids, const py::object& taus, const py::object& rows,
                   const py::object& seed, const py::object& start_seed, double delta,
                   int num_threads, bool tied, double tolerance, const std::string& start,
                   double keep, bool velocity) {
    s.norm_weight = input<float>(norm_weight, "norm_weight", 1);
    s.norm_bias = input<float>(norm_bias, "norm_bias", 1);
    s.items = input<float>(items, "items", 2);
    s.embedded_weight = input<float>(embedded_weight, "embedded_weight", 1);
    s.embedded_bias = input<float>(embedded_bias, "embedded_bias", 1);
    s.ids = input<std::int64_t>(ids, "ids", 2);
    s.taus = input<float>(taus, "taus", 2);
    s.num_threads = check_threads(num_threads);
    s.tied = tied;
    s.tolerance = tolerance;
    EulerSampler& a = s.a;
    const std::int64_t channels = packed.channels(), count = s.items.shape(0);
    a.encoder = make_encoder(packed, s.ids.shape(1));
    a.batch = s.ids.shape(0);
    a.steps = s.taus.shape(0);
    if (a.steps < 1) throw py::value_error("there must be at least one step, got q = 0");
    check_shape(s.norm_weight, "norm_weight", "[D]", {channels});
    check_shape(s.norm_bias, "norm_bias", "[D]", {channels});
    check_shape(s.items, "items", "[V, D]", {count, channels});
    check_shape(s.embedded_weight, "embedded_weight", "[D]", {channels});
    check_shape(s.embedded_bias, "embedded_bias", "[D]", {channels});
    check_shape(s.taus, "taus", "[q, D]", {a.steps, channels});
    if (rows.is_none()) {
        s.numbered.resize(static_cast<std::size_t>(a.batch));
        std::iota(s.numbered.begin(), s.numbered.end(), std::int64_t{0});
        a.rows = s.numbered.data();
    } else {
        s.rows = input<std::int64_t>(rows, "rows", 1);
        check_shape(s.rows, "rows", "[B]", {a.batch});
        a.rows = data<std::int64_t>(s.rows);
    }
    if (velocity && tolerance > 0.0) {
        throw py::value_error("all steps at once are for a network that predicts the end");
    }
    const std::int64_t* const id = data<std::int64_t>(s.ids);
    for (std::int64_t i = 0; i < s.ids.size(); ++i) {
        if (id[i] < 0 || id[i] >= count) {
            throw py::value_error("ids must be in 0 .. " + std::to_string(count - 1) + ", got " +
                                  std::to_string(id[i]));
        }
    }
    a.seed = static_cast<std::uint64_t>(read_int64(seed, "seed"));
    a.delta = static_cast<float>(delta);
    a.norm_weight = data<float>(s.norm_weight);
    a.norm_bias = data<float>(s.norm_bias);
    a.taus = data<float>(s.taus);
    a.velocity = velocity;
    Recommend& r = s.r;
    r.items = data<float>(s.items);
    r.norm_weight = data<float>(s.embedded_weight);
    r.norm_bias = data<float>(s.embedded_bias);
    r.ids = id;
    r.rows = a.rows;
    r.seed = static_cast<std::uint64_t>(read_int64(start_seed, "start_seed"));
    r.start = read_start(start);
    r.keep = static_cast<float>(keep);
    r.batch = a.batch;
    r.length = s.ids.shape(1);
    r.channels = channels;
}

// Embedding, start and sampler, into `out` [B, D]. Without the GIL.
void run_sampling(Sampling& s, float* out) {
    EulerSampler& a = s.a;
    Recommend& r = s.r;
    const RecommendKernels& kernels = FMREC_TABLE(recommend);
    const Floats memory = allocate_floats(
        r.batch * r.length * (r.channels + 1) + r.batch * r.channels + kernels.scratch(&r), false);
    r.e = memory.get();
    r.mask = r.e + r.batch * r.length * r.channels;
    r.z0 = r.mask + r.batch * r.length;
    kernels.prepare(&r, r.z0 + r.batch * r.channels);
    a.e = r.e;
    a.mask = r.mask;
    a.z0 = r.z0;
    a.out = out;
    if (s.tolerance > 0.0) {
        picard(a, FMREC_TABLE(picard_sweep), s.tolerance, s.tied, s.num_threads);
    } else {
        run_sequences(FMREC_TABLE(euler_sampler), a, 1, s.tied, s.num_threads);
    }
}

// From ids to the sampled embeddings in one call. A tolerance above 0 chooses the sampler that
// takes all steps at once.
void sample(const PackedEncoder& packed, const py::object& norm_weight,
            const py::object& norm_bias, const py::object& items,
            const py::object& embedded_weight, const py::object& embedded_bias,
            const py::object& ids, const py::object& taus, const py::object& rows,
            const py::object& seed, const py::object& start_seed, double delta,
            const py::object& out_, int num_threads, bool tied, double tolerance,
            const std::string& start, double keep, bool velocity) {
    Sampling s;
    read_sampling(s, packed, norm_weight, norm_bias, items, embedded_weight, embedded_bias, ids,
                  taus, rows, seed, start_seed, delta, num_threads, tied, tolerance, start, keep,
                  velocity);
    py::array out = output<float>(out_, "out", 2);
    check_shape(out, "out", "[B, D]", {s.r.batch, s.r.channels});
    const char* const names[] = {"norm_weight",     "norm_bias",     "items",
                                 "embedded_weight", "embedded_bias", "taus"};
    const py::array* const inputs[] = {&s.norm_weight,     &s.norm_bias,     &s.items,
                                       &s.embedded_weight, &s.embedded_bias, &s.taus};
    for (int i = 0; i < 6; ++i) check_overlap(out, "out", *inputs[i], names[i], false);
    if (is_empty(out)) return;
    float* const to = target(out);
    py::gil_scoped_release release;
    run_sampling(s, to);
}

// The same and the ranking.
void recommend(const PackedEncoder& packed, const py::object& norm_weight,
               const py::object& norm_bias, const py::object& items,
               const py::object& embedded_weight, const py::object& embedded_bias,
               const py::object& ids, const py::object& taus, const py::object& rows,
               const py::object& seed, const py::object& start_seed, double delta,
               const py::object& exclude, const py::object& scores_, const py::object& best_,
               int num_threads, bool tied, double tolerance, const std::string& start,
               double keep, bool velocity) {
    Sampling s;
    read_sampling(s, packed, norm_weight, norm_bias, items, embedded_weight, embedded_bias, ids,
                  taus, rows, seed, start_seed, delta, num_threads, tied, tolerance, start, keep,
                  velocity);
    py::array scores = output<float>(scores_, "scores", 2);
    py::array best = output<std::int64_t>(best_, "best", 2);
    const std::int64_t k = scores.shape(1);
    check_shape(scores, "scores", "[B, k]", {s.r.batch, k});
    check_shape(best, "best", "[B, k]", {s.r.batch, k});
    if (k > s.items.shape(0)) {
        throw py::value_error("k must be at most V = " + std::to_string(s.items.shape(0)) +
                              ", got " + std::to_string(k));
    }
    py::array_t<float> rep({s.r.batch, s.r.channels});
    const RankingCall ranking =
        ranking_call(rep, s.items, py::none(), py::none(), exclude, num_threads);
    if (is_empty(scores)) return;
    float* const out = rep.mutable_data();
    float* const to = target(scores);
    std::int64_t* const to_ids = static_cast<std::int64_t*>(best.mutable_data());
    py::gil_scoped_release release;
    run_sampling(s, out);
    rank_best(ranking, nullptr, 0, false, k, to, to_ids);
}

}  // namespace

void bind_recommend(py::module_& m) {
    m.def("recommend", &recommend, py::arg("packed"), py::arg("norm_weight"), py::arg("norm_bias"),
          py::arg("items"), py::arg("embedded_weight"), py::arg("embedded_bias"), py::arg("ids"),
          py::arg("taus"), py::arg("rows").none(true), py::arg("seed"), py::arg("start_seed"),
          py::arg("delta"), py::arg("exclude").none(true), py::arg("scores"), py::arg("best"),
          py::arg("num_threads"), py::arg("tied") = false, py::arg("tolerance") = 0.0,
          py::arg("start") = "noise", py::arg("keep") = 1.0, py::arg("velocity") = false,
          "From left-padded ids to the k best items: embedding, start, sampler, ranking.");
    m.def("sample", &sample, py::arg("packed"), py::arg("norm_weight"), py::arg("norm_bias"),
          py::arg("items"), py::arg("embedded_weight"), py::arg("embedded_bias"), py::arg("ids"),
          py::arg("taus"), py::arg("rows").none(true), py::arg("seed"), py::arg("start_seed"),
          py::arg("delta"), py::arg("out"), py::arg("num_threads"), py::arg("tied") = false,
          py::arg("tolerance") = 0.0, py::arg("start") = "noise", py::arg("keep") = 1.0,
          py::arg("velocity") = false,
          "From left-padded ids to the sampled embeddings [B, D]: embedding, start, sampler.");
}

}  // namespace fmrec
