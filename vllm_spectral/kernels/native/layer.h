// What a kernel needs to know of one layer: a copy of the caller's description, and tables derived from it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "abi.h"
#include "array.h"
#include "bases.h"
#include "features.h"

namespace vs {

constexpr int kGroup = 32;        // tokens transposed together
constexpr int kHalf = 16;         // tokens per vector of key words
constexpr int kVectorBytes = 64;  // one vector of words
constexpr int kScales = 128;
constexpr int kUnitScale = 64;    // index of scale 1; eight to an octave
constexpr uint8_t kFlat = 0x80;  // flag of a scale byte
constexpr int kValueScales = kGroup;  // byte of a group where the values' scales start; the keys' start at 0

struct Field {
  int32_t offset, shift, bits, channel;
  const uint32_t* pairs;  // levels of its codes as bf16, by 16-bit index; see Layer
  const float* levels;
};

// Fields that are expanded one by one; narrow ones, whose levels fit one vector register, first.
struct Singles {
  std::vector<Field> fields;  // channel: of the pair, counting pairs, for keys
  int64_t narrow = 0;
};

constexpr int kFusedRows = 8;     // most rows whose sums stay in registers while keys are expanded; more are a matrix
constexpr bool is_matrix(int64_t rows) { return kMatrices && rows > kFusedRows; }
constexpr int kByteLevels = 64;   // bytes of a vector register
constexpr int kQuadsAtOnce = 4;   // both parts of lists of values' quads are filled up with empty ones to multiples of it

// Two fields of one vector of words: of a key two pairs of channels, of a value two channels.
struct Quad {
  uint64_t places = 0, mask = 0, mark = 0;  // of each byte of 64 bits: its field's lowest bit, its code's bits, 2 ** bits
  int32_t offset = 0, members[2] = {-1, -1};  // members: a key's pairs, counting pairs, or a value's channels; -1: none
  int32_t bits = 0;                           // width of both fields; 0: they differ
};

// Those of one head: of two equal widths first, by width, then all others.
struct QuadList {
  std::vector<Quad> quads;
  int64_t alike = 0;  // quads of equal widths
  std::vector<int16_t> order;  // [whole tiles of quads, 2]: their members, -1: none
  int64_t size() const { return static_cast<int64_t>(quads.size()); }
  const Quad& operator[](int64_t i) const { return quads[i]; }
};

// A codebook's boundaries in the order in which a binary search meets them: those of depth d, 2 ** d of them, by the d bits
// found before. Each depth starts at a vector of its own.
constexpr int kDepths = 8;
constexpr int edges_at(int depth) { return depth <= 4 ? 16 * depth : 48 + (1 << depth); }
constexpr int kEdges = edges_at(kDepths);

constexpr int kNarrow = 5;  // widest codes whose levels fit one vector register

struct Coding {
  const float* basis;       // [H, D, D], the caller's
  Array<float> transposed;  // [H, D, D], of the values' basis: outputs are rotated back; none if matrices do that
  Array<float> center, width, inverse_width, flat_width, inverse_flat_width;  // [H, D]
  Array<float> inverse_stored, inverse_flat_stored;  // [H]: 1 / number of channels with bits
  Array<float> flat_needed;                          // [H]
  std::vector<std::vector<Field>> fields, flat;                               // per head, in the order of channels

  Coding(const CodingSpec& spec, int64_t heads, int64_t dim, bool transpose)
      : basis(spec.basis),
        transposed(transpose ? heads * dim * dim : 0),
        center(spec.center, heads * dim),
        width(spec.width, heads * dim),
        inverse_width(heads * dim),
        flat_width(spec.flat_width, heads * dim),
        inverse_flat_width(heads * dim),
        inverse_stored(heads),
        inverse_flat_stored(heads),
        flat_needed(spec.flat_needed, heads) {
    for (int64_t i = 0; transpose && i < heads * dim * dim; i++) {
      const int64_t head = i / (dim * dim), row = i / dim % dim, column = i % dim;
      transposed[(head * dim + column) * dim + row] = basis[i];
    }
    for (int64_t i = 0; i < heads * dim; i++) {
      inverse_width[i] = 1.0f / width[i];
      inverse_flat_width[i] = 1.0f / flat_width[i];
    }
    for (int64_t head = 0; head < heads; head++) {
      const int64_t at = head * dim;
      fields.push_back(list(spec.bits + at, spec.offset + at, spec.shift + at, dim, &inverse_stored[head]));
      flat.push_back(list(spec.flat_bits + at, spec.flat_offset + at, spec.flat_shift + at, dim, &inverse_flat_stored[head]));
    }
  }

  size_t bytes() const {
    size_t total = transposed.bytes() + center.bytes() + width.bytes() + inverse_width.bytes() +
                   flat_width.bytes() + inverse_flat_width.bytes() + inverse_stored.bytes() + inverse_flat_stored.bytes() + flat_needed.bytes();
    for (const auto& head : fields) total += head.size() * sizeof(Field);
    for (const auto& head : flat) total += head.size() * sizeof(Field);
    return total;
  }

 private:
  static std::vector<Field> list(const int32_t* bits, const int32_t* offset, const int32_t* shift, int64_t dim, float* inverse) {
    std::vector<Field> result;
    int stored = 0;
    for (int64_t c = 0; c < dim; c++) {
      result.push_back({offset[c], shift[c], bits[c], static_cast<int32_t>(c), nullptr, nullptr});
      stored += bits[c] > 0;
    }
    *inverse = 1.0f / static_cast<float>(stored > 1 ? stored : 1);
    return result;
  }
};

}  // namespace vs

struct Layer {
  int64_t heads, dim, slot_bytes, max_bits;
  vs::Coding keys, values;
  std::vector<int32_t> key_start, key_half, value_start;
  std::vector<vs::Singles> key_pairs, value_singles;        // per head: what no quad holds
  std::vector<vs::QuadList> key_quads, value_quads;           // per head
  vs::TiledBases key_tiles, value_tiles;  // the keys' bases, and the values' transposed ones
  vs::Array<int8_t> byte_levels;     // [kNarrow + 1, kByteLevels] of both fields' width, see below; of width 0: of all
  int64_t quad_floats = 0;           // two of each quad of values, of the head that has most, in whole vectors
  vs::Array<float> key_steps;      // [H, D] one step of a byte level; 0: in no quad
  vs::Array<float> quad_steps;     // [H, quad_floats] the same times the width, of values in the order of quads
  vs::Array<int32_t> quad_place;   // [H, D] of values' channels in that order; -1: in no quad
  vs::Array<float> levels;  // [max_bits + 1][row]
  int64_t row;              // floats per row
  vs::Array<float> edges;   // [max_bits + 1][vs::kEdges]: codebooks' boundaries by depth of a binary search
  vs::Array<uint32_t> pair_tables;      // [max_bits + 1][pair_row]: bf16 levels by 16-bit index, see attend
  vs::Array<float> scales, inverse_scales, scale_bounds;
  vs::Array<float> lowest_octave;  // [16] the first eight scales, twice
  int64_t search_first, search_count;
  float fallback_gain;

  explicit Layer(const LayerSpec& spec)
      : heads(spec.num_heads),
        dim(spec.head_dim),
        slot_bytes(spec.slot_bytes),
        max_bits(spec.max_bits),
        keys(spec.keys, heads, dim, false),
        values(spec.values, heads, dim, !vs::kMatrices),
        key_start(spec.key_start, spec.key_start + heads),
        key_half(spec.key_half, spec.key_half + heads),
        value_start(spec.value_start, spec.value_start + heads),
        key_tiles(spec.keys.basis, vs::kMatrices ? heads : 0, dim, false),
        value_tiles(spec.values.basis, vs::kMatrices ? heads : 0, dim, true),
        byte_levels((vs::kNarrow + 1) * vs::kByteLevels),
        key_steps(heads * dim),
        quad_place(heads * dim),
        levels(spec.levels, (max_bits + 1) << max_bits),
        row(1 << max_bits),
        edges((max_bits + 1) * vs::kEdges),
        pair_tables((max_bits + 1) * pair_row()),
        scales(spec.scales, vs::kScales),
        inverse_scales(spec.inverse_scales, vs::kScales),
        scale_bounds(spec.scale_bounds, vs::kScales - 1),
        lowest_octave(16),
        search_first(spec.search_first),
        search_count(spec.search_count),
        fallback_gain(spec.fallback_gain) {
    for (vs::Coding* coding : {&keys, &values})
      for (auto* lists : {&coding->fields, &coding->flat})
        for (auto& list : *lists)
          for (vs::Field& field : list) {
            field.pairs = pair_tables.get() + field.bits * pair_row();
            field.levels = levels.get() + field.bits * row;
          }
    for (int i = 0; i < 16; i++) lowest_octave[i] = std::ldexp(scales[vs::kUnitScale + i % 8], -vs::kUnitScale / 8);
    // One step for all widths: a step for each would fit the levels of narrow fields better, but spread the query wider.
    const int64_t widest = std::min<int64_t>(vs::kNarrow, max_bits);
    float most = 0;
    for (int code = 0; code < 1 << widest; code++) most = std::max(most, std::abs(levels[widest * row + code]));
    for (int64_t bits = 1; bits <= widest; bits++)
      for (int code = 0; code < 1 << bits; code++) {
        const float rounded = std::round(levels[bits * row + code] * 127 / most);
        const int8_t level = static_cast<int8_t>(std::clamp(rounded, -127.0f, 127.0f));
        // Of all widths: the entry of code c of b bits is 2 ** b + c, entry 0 is 0. Of one: repeated, so that bits of
        // neighbouring fields above an index do no harm.
        byte_levels[(1 << bits) + code] = level;
        for (int i = code; i < vs::kByteLevels; i += 1 << bits) byte_levels[bits * vs::kByteLevels + i] = level;
      }
    const float step = most / 127;
    for (int64_t head = 0; head < heads; head++) {
      std::vector<vs::Field> pairs, channels;
      for (int64_t c = 0; c < dim; c++) {
        const vs::Field &key = keys.fields[head][c], &value = values.fields[head][c];
        if (key.bits && c % 2 == 0) {
          pairs.push_back(key);
          pairs.back().channel /= 2;
        }
        if (value.bits) channels.push_back(value);
        if (vs::kQuads && key.bits && key.bits <= vs::kNarrow) key_steps[head * dim + c] = step;
      }
      key_quads.push_back(quads(pairs, true));
      value_quads.push_back(quads(channels, false));
      key_pairs.push_back(singles(pairs));
      value_singles.push_back(singles(channels));
      quad_floats = std::max<int64_t>(quad_floats, (2 * value_quads.back().size() + 15) / 16 * 16);
    }
    quad_steps = vs::Array<float>(heads * quad_floats);
    std::fill(quad_place.get(), quad_place.get() + heads * dim, -1);
    for (int64_t head = 0; head < heads; head++)
      for (int64_t i = 0; i < 2 * value_quads[head].size(); i++) {
        const int32_t channel = value_quads[head][i / 2].members[i % 2];
        if (channel < 0) continue;
        quad_steps[head * quad_floats + i] = step * values.width[head * dim + channel];
        quad_place[head * dim + channel] = static_cast<int32_t>(i);
      }
    for (int64_t bits = 1; bits <= max_bits; bits++)
      for (int depth = 0; depth < bits; depth++)
        for (int64_t i = 0; i < int64_t{1} << depth; i++)
          edges[bits * vs::kEdges + vs::edges_at(depth) + i] =
              spec.boundaries[bits * row + (i << (bits - depth)) + (int64_t{1} << (bits - depth - 1)) - 1];
    // 16-bit entries; short tables are repeated, so that bits of neighbouring fields above an index do no harm.
    uint16_t* table = reinterpret_cast<uint16_t*>(pair_tables.get());
    for (int64_t bits = 0; bits <= max_bits; bits++)
      for (int64_t i = 0; i < 2 * pair_row(); i++) {
        uint32_t level;
        memcpy(&level, &levels[bits * row + (i & ((1 << bits) - 1))], 4);
        table[bits * 2 * pair_row() + i] = static_cast<uint16_t>(level >> 16);
      }
  }

  // The narrow ones of a head's fields, two by two from the same vector of words where it has two, of one width if possible.
  static vs::QuadList quads(const std::vector<vs::Field>& fields, bool keys) {
    vs::QuadList found;
    if (!vs::kQuads) return found;
    // Of a vector of words by width, and what is left over of each width.
    std::map<int32_t, std::map<int32_t, std::vector<vs::Field>>> by_vector;
    for (const vs::Field& field : fields)
      if (field.bits <= vs::kNarrow) by_vector[field.offset][field.bits].push_back(field);
    std::vector<vs::Quad> mixed;
    for (const auto& vector : by_vector) {
      std::vector<vs::Field> left;
      for (const auto& width : vector.second) {
        const std::vector<vs::Field>& list = width.second;
        for (size_t i = 0; i + 1 < list.size(); i += 2) found.quads.push_back(quad(keys, {list[i], list[i + 1]}));
        if (list.size() % 2) left.push_back(list.back());
      }
      for (size_t i = 0; i + 1 < left.size(); i += 2) mixed.push_back(quad(keys, {left[i], left[i + 1]}));
      if (left.size() % 2) found.quads.push_back(quad(keys, {left.back()}));
    }
    std::stable_sort(found.quads.begin(), found.quads.end(), [](const vs::Quad& a, const vs::Quad& b) { return a.bits < b.bits; });
    const auto fill = [&](int32_t bits) {
      while (!keys && found.quads.size() % vs::kQuadsAtOnce) {
        found.quads.emplace_back();
        found.quads.back().bits = bits;
      }
    };
    fill(1);
    found.alike = found.size();
    found.quads.insert(found.quads.end(), mixed.begin(), mixed.end());
    fill(0);
    found.order.resize(2 * vs::whole_tiles(found.size()), -1);
    for (int64_t i = 0; i < 2 * found.size(); i++) found.order[i] = static_cast<int16_t>(found[i / 2].members[i % 2]);
    return found;
  }

  static vs::Quad quad(bool keys, const std::vector<vs::Field>& fields) {
    vs::Quad quad;
    quad.offset = fields[0].offset;
    quad.bits = fields[0].bits == fields.back().bits ? fields[0].bits : 0;
    for (size_t half = 0; half < fields.size(); half++) {
      const vs::Field& field = fields[half];
      quad.members[half] = field.channel;
      for (int k = 0; k < 4; k++) {
        // A key's 64 bits are two tokens of two words, a value's one word of four tokens.
        const int byte = keys ? k / 2 * 4 + 2 * half + k % 2 : 4 * half + k;
        quad.places |= static_cast<uint64_t>(field.shift + 16 * k) << 8 * byte;
        quad.mask |= ((uint64_t{1} << field.bits) - 1) << 8 * byte;
        quad.mark |= uint64_t{1} << field.bits << 8 * byte;
      }
    }
    return quad;
  }

  // All others, narrow ones first.
  static vs::Singles singles(const std::vector<vs::Field>& fields) {
    vs::Singles found;
    for (const bool wide : {false, true}) {
      for (const vs::Field& field : fields)
        if ((field.bits > vs::kNarrow) == wide && (wide || !vs::kQuads)) found.fields.push_back(field);
      if (!wide) found.narrow = static_cast<int64_t>(found.fields.size());
    }
    return found;
  }

  int64_t pair_row() const { return (row > 32 ? row : 32) / 2; }  // 32-bit units

  size_t bytes() const {
    return keys.bytes() + values.bytes() + key_tiles.bytes() + value_tiles.bytes() + byte_levels.bytes() + key_steps.bytes() + quad_steps.bytes() + quad_place.bytes() +
           levels.bytes() + edges.bytes() + pair_tables.bytes() + scales.bytes() + inverse_scales.bytes() + scale_bounds.bytes() +
           lowest_octave.bytes();
  }
};
