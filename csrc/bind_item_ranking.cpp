#include "bind_item_ranking.h"

namespace fmrec {
namespace {

void check_items(const py::array& ids, const char* name, std::int64_t least, std::int64_t items) {
    const std::int64_t* id = data<std::int64_t>(ids);
    for (py::ssize_t i = 0; i < ids.size(); ++i) {
        if (id[i] < least || id[i] >= items) {
            throw py::value_error(std::string(name) + " must be in " + std::to_string(least) +
                                  " .. V - 1 = " + std::to_string(items - 1) + ", got " +
                                  std::to_string(id[i]));
        }
    }
}

}  // namespace

RankingCall ranking_call(const py::array& rep, const py::array& weight, const py::object& scale_,
                         const py::object& bias_, const py::object& exclude_, int num_threads) {
    RankingCall call{};
    call.rows = rep.shape(0);
    call.items = weight.shape(0);
    call.a.depth = rep.shape(1);
    check_shape(weight, "weight", "[V, D]", {call.items, rep.shape(1)});
    if (call.items >= std::int64_t{1} << 31) {
        throw py::value_error("weight must have less than 2**31 rows, got " +
                              std::to_string(call.items));
    }
    call.a.rep = data<float>(rep);
    call.a.weight = weight.data();
    call.a.type = weight.itemsize() == 4   ? TableType::float32
                  : weight.itemsize() == 2 ? TableType::bfloat16
                                           : TableType::int8;
    call.num_threads = check_threads(num_threads);
    if ((call.a.type == TableType::int8) != !scale_.is_none()) {
        throw py::value_error("an int8 weight comes with a scale, no other does");
    }
    if (!scale_.is_none()) {
        const py::array scale = input<float>(scale_, "scale", 1);
        check_shape(scale, "scale", "[V]", {call.items});
        call.a.scale = data<float>(scale);
    }
    if (!bias_.is_none()) {
        const py::array bias = input<float>(bias_, "bias", 1);
        check_shape(bias, "bias", "[V]", {call.items});
        call.a.bias = data<float>(bias);
    }
    if (!exclude_.is_none()) {
        const py::array exclude = input<std::int64_t>(exclude_, "exclude", 2);
        check_shape(exclude, "exclude", "[B, E]", {call.rows, exclude.shape(1)});
        check_items(exclude, "exclude", -1, call.items);
        call.exclude = data<std::int64_t>(exclude);
        call.excludes = exclude.shape(1);
    }
    return call;
}

namespace {

bool is_table(const py::dtype& dtype) {
    return is_dtype<float>(dtype) || is_dtype<std::uint16_t>(dtype) || is_dtype<std::int8_t>(dtype);
}

py::array item_table(const py::object& weight) {
    return checked_array(weight, "weight", "float32, uint16 or int8", is_table, 2, false);
}

void item_topk(const py::object& rep_, const py::object& weight_, const py::object& scale,
               const py::object& bias, const py::object& exclude, const py::object& candidates_,
               const py::object& scores_, const py::object& ids_, int num_threads) {
    const py::array rep = input<float>(rep_, "rep", 2), weight = item_table(weight_);
    const RankingCall call = ranking_call(rep, weight, scale, bias, exclude, num_threads);
    py::array scores = output<float>(scores_, "scores", 2);
    py::array ids = output<std::int64_t>(ids_, "ids", 2);
    const std::int64_t k = scores.shape(1);
    check_shape(scores, "scores", "[B, k]", {call.rows, k});
    check_shape(ids, "ids", "[B, k]", {call.rows, k});
    const std::int64_t* candidates = nullptr;
    std::int64_t count = 0;
    bool per_row = false;
    if (!candidates_.is_none()) {
        per_row = py::isinstance<py::array>(candidates_) &&
                  py::reinterpret_borrow<py::array>(candidates_).ndim() == 2;
        const py::array array = input<std::int64_t>(candidates_, "candidates", per_row ? 2 : 1);
        count = array.shape(per_row ? 1 : 0);
        if (per_row) check_shape(array, "candidates", "[B, C]", {call.rows, count});
        check_items(array, "candidates", -1, call.items);
        candidates = data<std::int64_t>(array);
    }
    if (is_empty(scores)) return;
    float* const to = target(scores);
    std::int64_t* const to_ids = static_cast<std::int64_t*>(ids.mutable_data());
    py::gil_scoped_release release;
    rank_best(call, candidates, count, per_row, k, to, to_ids);
}

void target_rank(const py::object& rep_, const py::object& weight_, const py::object& bias,
                 const py::object& target_, const py::object& exclude, const py::object& ranks_,
                 int num_threads, const py::object& of_target_) {
    const py::array rep = input<float>(rep_, "rep", 2), weight = item_table(weight_);
    const RankingCall call = ranking_call(rep, weight, py::none(), bias, exclude, num_threads);
    const py::array wanted = input<std::int64_t>(target_, "target", 1);
    py::array ranks = output<std::int64_t>(ranks_, "ranks", 1);
    check_shape(wanted, "target", "[B]", {call.rows});
    const float* of_target = nullptr;
    if (of_target_.is_none()) {
        check_items(wanted, "target", 0, call.items);
    } else {
        const py::array given = input<float>(of_target_, "of_target", 1);
        check_shape(given, "of_target", "[B]", {call.rows});
        of_target = data<float>(given);
    }
    check_shape(ranks, "ranks", "[B]", {call.rows});
    if (is_empty(ranks)) return;
    std::int64_t* const to = static_cast<std::int64_t*>(ranks.mutable_data());
    py::gil_scoped_release release;
    rank_targets(call, data<std::int64_t>(wanted), of_target, to);
}

}  // namespace

void bind_item_ranking(py::module_& m) {
    m.def("item_topk", &item_topk, py::arg("rep"), py::arg("weight"), py::arg("scale").none(true),
          py::arg("bias").none(true), py::arg("exclude").none(true),
          py::arg("candidates").none(true), py::arg("scores"), py::arg("ids"),
          py::arg("num_threads"),
          "scores, ids = the k best of rep @ (scale * weight).T + bias, ties towards the lower id; "
          "weight is float32, bfloat16 (as uint16) or int8.");
    m.def("target_rank", &target_rank, py::arg("rep"), py::arg("weight"),
          py::arg("bias").none(true), py::arg("target"), py::arg("exclude").none(true),
          py::arg("ranks"), py::arg("num_threads"), py::arg("of_target") = py::none(),
          "ranks = 1 + number of items ahead of the target, whose score may be given: then it need "
          "not be an item of this table, and target is where it would be.");
}

}  // namespace fmrec
