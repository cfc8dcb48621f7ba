// Random bits for rounding: a hash of what they depend on, and no state. So they are the same on every backend and
// any number of threads, when training resumes, for replicas and for shards of a parameter.
//
//   word of a seed       = mix(mix(0x9e3779b9 ^ its lower half) ^ its upper half)
//   key of a parameter   = mix(mix(word ^ place) ^ step)
//   key of 8-bit state   = mix(key of its parameter ^ a constant)
//   key of an average    = mix(mix(word ^ number of its update) ^ place)
//   bits of an element   = upper half of mix(key ^ its index); in 8-bit state, see codes.h
//
// mix is a bijection of 32 bits (https://github.com/skeeto/hash-prospector, "lowbias32"). A flip of any bit of the
// seed, place, step or element flips each bit of the result in half of all cases; tests/test_random_bits.py counts.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace trainops {

// mix without its last line, which leaves the upper half as it is.
TRAINOPS_HOST_DEVICE uint32_t scramble(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  return x * 0x846ca68bu;
}

TRAINOPS_HOST_DEVICE uint32_t mix(uint32_t x) {
  x = scramble(x);
  return x ^ x >> 16;
}

// What the random bits of a tensor's elements depend on, beside the element.
struct Random {
  uint32_t key = 0;
  uint32_t origin = 0;  // the index of the first element: in a shard, that in the whole parameter

  // 16 bits for an element. Indices are taken modulo 2^32.
  TRAINOPS_HOST_DEVICE uint32_t bits(int64_t i) const {
    return scramble(key ^ (origin + static_cast<uint32_t>(i))) >> 16;
  }

  // 32 bits.
  TRAINOPS_HOST_DEVICE uint32_t word(int64_t i) const { return mix(key ^ (origin + static_cast<uint32_t>(i))); }

  TRAINOPS_HOST_DEVICE Random from(int64_t begin) const { return {key, origin + static_cast<uint32_t>(begin)}; }
};

// `seed`: the word of a seed, or of an average's seed at an update. `place`: the parameter's in `param_groups`, or
// the average's in its model.
TRAINOPS_HOST_DEVICE uint32_t random_key(uint32_t seed, int64_t place) {
  return mix(seed ^ static_cast<uint32_t>(place));
}

// The same of a parameter, at its own step count.
TRAINOPS_HOST_DEVICE uint32_t random_key(uint32_t seed, int64_t place, double step) {
  return mix(random_key(seed, place) ^ static_cast<uint32_t>(static_cast<int64_t>(step)));
}

}  // namespace trainops
