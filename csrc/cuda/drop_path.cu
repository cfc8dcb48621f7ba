// DropPath with its residual and layer scale: the formula is in math/drop_path.h.
// Per element of a kept sample: reads branch and residual, writes out (12 bytes in float32). With a residual, a
// dropped sample's branch is not read. Arithmetic in float32, or float64 when all operands are.
#include "drop_path.cuh"

namespace trainops::cuda {
namespace {

// Quotient and remainder of an element index by `size`. One 64-bit division serves a whole chunk.
struct Cycle {
  int64_t size, turn, position;

  __device__ Cycle(int64_t element, int64_t period) : size(period), turn(element / period) {
    position = element - turn * period;
  }

  // The same for the element that is `offset` further on, at most a chunk.
  __device__ Cycle after(int64_t offset) const {
    Cycle moved = *this;
    moved.position += offset;
    if (size >= kChunkNumel) {
      if (moved.position >= size) {
        moved.position -= size;
        ++moved.turn;
      }
    } else {
      const auto turns = static_cast<uint32_t>(moved.position) / static_cast<uint32_t>(size);
      moved.position -= turns * size;
      moved.turn += turns;
    }
    return moved;
  }
};

template <typename T>
__device__ void forward_pack(const DropPath& args, const VectorRange<T>& range, int64_t tile, const Cycle& sample,
                             const Cycle& channel) {
  const LaneOffset offset(range, tile, threadIdx.x);
  const int64_t firsts[2] = {offset.first - range.begin, offset.second - range.begin};
  const bool exist[2] = {offset.has_first, offset.has_second};
  T mask[2] = {};
  int64_t shifts[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!exist[half]) continue;
    const int64_t own = sample.after(firsts[half]).turn;
    mask[half] = load_operand<T>(args.mask, own);
    shifts[half] = sample_offset(args.rows, own, args.sample_numel);
  }
  LaneOffset scale_offset = offset, branch_offset = offset;
  scale_offset.first = channel.after(firsts[0]).position;
  scale_offset.second = channel.after(firsts[1]).position;
  const bool has_residual = args.residual.address != nullptr;
  branch_offset.first += shifts[0];
  branch_offset.second += shifts[1];
  branch_offset.has_first = offset.has_first && (!has_residual || mask[0] != T(0));
  branch_offset.has_second = offset.has_second && (!has_residual || mask[1] != T(0));
  const Raw raw_branch = fetch<T>(args.branch, branch_offset), raw_residual = fetch<T>(args.residual, offset);
  const Raw raw_scale = fetch<T>(args.layer_scale, scale_offset);

  T x[kPack<T>], layer_scale[kPack<T>], residual[kPack<T>];
  unpack(raw_branch, args.branch.dtype, x);
  unpack(raw_scale, args.layer_scale.dtype, layer_scale);
  unpack(raw_residual, args.residual.dtype, residual);
  const bool has_scale = args.layer_scale.address != nullptr;
  with_rounding<T>(args.mask.dtype, [&](auto round) {
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      const T value = mask[j / kHalf<T>];
      x[j] = term(x[j], has_scale ? layer_scale[j] : T(1), value, round);
      if (has_residual) x[j] = value == T(0) ? residual[j] : residual[j] + x[j];
    }
  });
  put<T>(args.out, offset, pack(x, args.out.dtype));
}

template <typename T>
__device__ void forward_one(const DropPath& args, int64_t i, int64_t sample, int64_t channel) {
  const bool has_residual = args.residual.address != nullptr;
  const T mask = load_operand<T>(args.mask, sample),
          residual = has_residual ? load_operand<T>(args.residual, i) : T(0);
  T result = residual;
  if (!has_residual || mask != T(0)) {
    const int64_t branch_offset = i + sample_offset(args.rows, sample, args.sample_numel);
    const T layer_scale = args.layer_scale.address == nullptr ? T(1) : load_operand<T>(args.layer_scale, channel);
    with_rounding<T>(args.mask.dtype, [&](auto round) {
      result = term(load_operand<T>(args.branch, branch_offset), layer_scale, mask, round);
      if (has_residual) result = residual + result;
    });
  }
  store(args.out, i, result);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) drop_path_kernel(const __grid_constant__ DropPath args) {
  const int64_t numel = args.samples * args.sample_numel;
  const bool whole_channels = args.layer_scale.address == nullptr || args.channels % kPack<T> == 0;
  const bool regular = args.sample_numel % kPack<T> == 0 && whole_channels;
  for (int64_t begin = blockIdx.x * kChunkNumel; begin < numel; begin += gridDim.x * kChunkNumel) {
    VectorRange<T> range(begin, numel - begin < kChunkNumel ? numel : begin + kChunkNumel, kThreads);
    for (const Cell* cell : {&args.out, &args.branch, &args.residual, &args.layer_scale}) range.add(*cell);
    range.close(regular);
    const Cycle sample(begin, args.sample_numel), channel(begin, args.channels);
    for (int64_t tile = begin; tile < range.body; tile += kThreads * kPack<T>) {
      forward_pack(args, range, tile, sample, channel);
    }
    for (int64_t i = range.body + threadIdx.x; i < range.end; i += kThreads) {
      forward_one<T>(args, i, sample.after(i - begin).turn, channel.after(i - begin).position);
    }
  }
}

}  // namespace

void drop_path(const DropPath& args, void* stream) {
  const Queue queue{args.device, stream};
  const int64_t chunks = (args.samples * args.sample_numel + kChunkNumel - 1) / kChunkNumel;
  const auto kernel = args.branch.dtype == DType::float64 ? drop_path_kernel<double> : drop_path_kernel<float>;
  launch(kernel, "drop_path", chunks, queue, args);
}

}  // namespace trainops::cuda
