// Attend: one step's queries over compressed pages and exact copies. Compiled once per instruction set.
//
// Work is cut into tiles of 512 and spans of 1024 positions, at fixed multiples of both. A tile's softmax is merged into
// its span's, a span's into the result, in order. So a query's output has the same bits however its prompt was cut, whoever
// shares the batch and however many threads run: each row sees the same operations in the same order everywhere.
//
// Products run over pairs. For scores a pair is two channels of one token: a lane is a token, and a query's pair is
// broadcast. For outputs a pair is two tokens of one channel: lanes are 16 such pairs, added up at the end of a tile.
//
// Where the machine multiplies bytes, narrow fields run over quads: four channels of one token, four tokens of one channel. A
// row's query is rounded to 8 bits of its largest channel; a row's weights in a tile to 8 bits of the largest, each lane's
// rounding error carried on to its next token, so that many small weights do not vanish together. Sums are integers, exact.
#include <omp.h>

#include <algorithm>
#include <new>
#include <vector>

#include "copies.h"
#include "outputs.h"
#include "queries.h"
#include "scores.h"
#include "store.h"
#include "weights.h"
#include "work.h"

namespace {

constexpr int kWrites = 16;  // copies per unit of work
constexpr int64_t kMostStates = 64 << 20;  // floats: what is summed up by spans that may wait to be merged

// Which rows read what of a group from where.
void look_at(const Work& w, Tile& tile, int g) {
  const int64_t first = tile.first(g);
  const uint32_t copies = copied(w, first, tile.copy_lines[g]);
  tile.whole[g] = !copies && w.all_see(first, vs::kGroup);
  tile.any_paged[g] = tile.whole[g] ? ~0u : 0;
  tile.any_exact[g] = 0;
  for (int64_t r = 0; r < w.rows && !tile.whole[g]; r++) {
    const uint32_t seen = w.scratch.seen[r * kTileGroups + g] = w.seen(r, first);
    const uint32_t exact = w.scratch.exact[r * kTileGroups + g] = seen & copies & w.near(r, first);
    tile.any_exact[g] |= exact;
    tile.any_paged[g] |= seen & ~exact;
  }
}

void attend_tile(Work& w, Tile& tile, State& state) {
  tile.all_whole = tile.groups == kTileGroups && !w.any_near(tile.start, kTile) && w.all_see(tile.start, kTile);
  const bool matrix = vs::is_matrix(w.rows);
  bool paged = tile.all_whole, exact = false;
  uint32_t flat_keys = 0;
  for (int g = 0; g < tile.groups; g++) {
    if (tile.all_whole) {
      tile.whole[g] = true;
      tile.any_exact[g] = 0;
      tile.any_paged[g] = ~0u;
    } else {
      look_at(w, tile, g);
      paged |= tile.any_paged[g] != 0;
      exact |= tile.any_exact[g] != 0;
    }
    if (tile.any_paged[g]) {
      const uint8_t *keys = tile.pages[g], *values = keys + vs::kValueScales;
      const uint64_t flags = flat_masks(keys);
      flat_keys |= tile.key_flat[g] = static_cast<uint32_t>(flags);
      tile.value_flat[g] = static_cast<uint32_t>(flags >> 32);
      for (int h = 0; h < 2; h++) {
        tile.key_scale[g][h] = scales(w.layer, keys + h * vs::kHalf) * w.score_scale;
        tile.value_scale[g][h] = scales(w.layer, values + h * vs::kHalf);
      }
      // A group's scales lie in the line that is fetched just before its keys: nothing waits for those of a whole tile.
      if (matrix)
        count_scores(w, tile, g);
      else
        page_scores(w, tile, g);
    }
    if (!matrix && tile.any_exact[g]) exact_scores(w, tile, g);
  }
  // What matrices have summed becomes scores where it is weighed, unless some of it must be put right first.
  tile.late = matrix && tile.all_whole && w.call.soft_cap <= 0 && !flat_keys;
  for (int g = 0; matrix && g < tile.groups; g++) {
    if (tile.any_paged[g] && !tile.late) page_scores(w, tile, g);
    if (tile.any_exact[g]) exact_scores(w, tile, g);
  }
  if (!paged && !exact) return;
  weigh(w, tile, state);
  if (paged) page_outputs(w, tile, state);
  if (exact) exact_outputs(w, tile, state);
}

// Attends to an item's tiles and merges them, span by span, into its slices' states.
void attend(const Shape& shape, const Item& item, const std::vector<Queries>& queries, const Item* following, Scratch& scratch,
            std::vector<Work>& works, float* states) {
  const int64_t count = slices(item);
  works.clear();
  for (int64_t i = 0; i < count; i++)
    works.emplace_back(shape, slice_of(item, i), queries[i], scratch, i + 1 == count ? following : nullptr);
  Tile tile;
  const int64_t tiles_per_span = kSpan / kTile;
  for (int64_t index = item.first_tile; index < item.last_tile;) {
    const int64_t end = std::min((index / tiles_per_span + 1) * tiles_per_span, item.last_tile);
    const bool first = index == item.first_tile;  // nothing to be merged with
    float* spans = first ? states : scratch.span;
    for (int64_t i = 0; i < count; i++) state_of(spans, i, item, shape.layer).clear(works[i].rows);
    for (; index < end; index++) {
      tile.move(works.back(), index, index > item.first_tile);
      for (int64_t i = 0; i < count; i++) {
        State span = state_of(spans, i, item, shape.layer);
        tile.show(works[i]);
        attend_tile(works[i], tile, span);
      }
    }
    for (int64_t i = 0; !first && i < count; i++)
      state_of(states, i, item, shape.layer).merge(state_of(spans, i, item, shape.layer), works[i].rows);
  }
}

int64_t tiles(int64_t context) { return (context + kTile - 1) / kTile; }

// What threads take: every request's rows in blocks. One that is longer than a fair part of a thread's share is cut into spans,
// as long as there is room for their states.
struct Plan {
  std::vector<Item> blocks;      // done by one thread, the longest first
  int64_t num_long = 0;          // of these, longer than a span
  std::vector<Item> cut, spans;  // blocks that are cut, and their spans, in order
  std::vector<int64_t> first_span;  // of each cut block, and the end
  std::vector<int64_t> block_of;    // of each span

  explicit Plan(const Shape& shape) {
    for (int64_t request = 0; request < shape.call.num_requests; request++)
      for (int64_t row = 0; row < shape.rows(request); row += kRows)
        for (int64_t head = 0; head < shape.layer.heads; head++) {
          const int64_t rows = std::min<int64_t>(kRows, shape.rows(request) - row);
          const int64_t before = shape.call.context_lens[request] - shape.queries(request);
          blocks.push_back({request, head, row, rows, 0, tiles(before + (row + rows - 1) / shape.group + 1)});
        }
    std::stable_sort(blocks.begin(), blocks.end(), [](const Item& a, const Item& b) { return a.last_tile > b.last_tile; });
    constexpr int64_t tiles_per_span = kSpan / kTile, parts = 8;  // of a thread's share
    const auto is_long = [&](const Item& item) { return item.last_tile > tiles_per_span; };
    int64_t total = 0, floats = 0;
    for (const Item& item : blocks) total += item.last_tile;
    auto end = blocks.begin();
    for (; end != blocks.end() && is_long(*end) && end->last_tile * parts * shape.call.num_threads > total; ++end) {
      floats += (end->last_tile + tiles_per_span - 1) / tiles_per_span * states_floats(*end, shape.layer);
      if (floats > kMostStates) break;
    }
    cut.assign(blocks.begin(), end);
    blocks.erase(blocks.begin(), end);
    num_long = std::find_if_not(blocks.begin(), blocks.end(), is_long) - blocks.begin();
    for (const Item& item : cut) {
      first_span.push_back(spans.size());
      for (int64_t tile = 0; tile < item.last_tile; tile += tiles_per_span) {
        block_of.push_back(first_span.size() - 1);
        spans.push_back(item);
        spans.back().first_tile = tile;
        spans.back().last_tile = std::min(tile + tiles_per_span, item.last_tile);
      }
    }
    first_span.push_back(spans.size());
  }
};

// What cut blocks need beside the threads' scratch.
struct Shared {
  std::vector<std::vector<Queries>> queries;  // of each cut block's slices
  std::vector<float*> states;                 // of each span
  Shared(const Plan& plan, const Layer& layer, vs::Carver& carver) {
    for (const Item& item : plan.cut) {
      queries.emplace_back();
      for (int64_t i = 0; i < slices(item); i++) queries.back().emplace_back(slice_of(item, i).rows, layer.dim, carver);
    }
    for (const Item& item : plan.spans) {
      states.emplace_back();
      carver.take(states.back(), states_floats(item, layer));
    }
  }
};

}  // namespace

static int64_t step(const Layer& layer, const StepCall& call) {
  const Shape shape(layer, call);
  const Plan plan(shape);
  const int64_t dim = layer.dim, blocks = plan.blocks.size(), cut = plan.cut.size(), spans = plan.spans.size();
  const int64_t stored = vs::store_units(layer, call);
  const int64_t written = call.exact_on ? (call.num_writes + kWrites - 1) / kWrites : 0, first_span = plan.num_long;
  vs::Carver counter(nullptr);
  vs::StoreScratch(layer, counter);
  Scratch(layer, counter);
  const size_t each = counter.used();
  Shared(plan, layer, counter);
  const int64_t needed = (call.num_threads - 1) * each + counter.used();
  if (needed > call.workspace_bytes) return needed;
  vs::Carver carver(call.workspace + call.num_threads * each);
  Shared shared(plan, layer, carver);
#pragma omp parallel num_threads(call.num_threads)
  {
    vs::Carver own(call.workspace + omp_get_thread_num() * each);
    vs::StoreScratch store_scratch(layer, own);
    Scratch scratch(layer, own);
    std::vector<Work> works;  // an item's slices; kept, so that only the first item allocates
    works.reserve(kRows / kSlice);
    Matrices matrices;
    std::fill(scratch.zeros, scratch.zeros + dim, uint16_t{0});
    // Before anything is read: a request of this step may share a prefix that another one is just writing.
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < stored + cut + written; i++) {
      if (i < stored)
        vs::store_unit(layer, call, i, store_scratch);
      else if (i < stored + cut)
        prepare(shape, plan.cut[i - stored], shared.queries[i - stored], scratch);
      else
        for (int64_t k = (i - stored - cut) * kWrites; k < std::min((i - stored - cut + 1) * kWrites, call.num_writes); k++)
          write_copy(layer, call, k, scratch.lines);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < spans + blocks; i++) {
      // The longest first: blocks that were not cut, spans, short blocks.
      const int64_t span = i - first_span;
      if (span >= 0 && span < spans) {
        const Item& item = plan.spans[span];
        const Item* next = span + call.num_threads < spans ? &item + call.num_threads : nullptr;
        attend(shape, item, shared.queries[plan.block_of[span]], next, scratch, works, shared.states[span]);
        continue;
      }
      const int64_t block = span < 0 ? i : i - spans;
      const Item& item = plan.blocks[block];
      const bool more = block + call.num_threads < blocks;
      prepare(shape, item, scratch.queries, scratch);
      attend(shape, item, scratch.queries, more ? &item + call.num_threads : nullptr, scratch, works, scratch.item);
      finish(shape, item, scratch.item, scratch);
    }
    if (cut) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < cut; i++) {
        const Item& item = plan.cut[i];
        for (int64_t k = 0; k < slices(item); k++) {
          State state = state_of(scratch.item, k, item, layer);
          const int64_t rows = slice_of(item, k).rows;
          state.clear(rows);
          for (int64_t span = plan.first_span[i]; span < plan.first_span[i + 1]; span++)
            state.merge(state_of(shared.states[span], k, item, layer), rows);
        }
        finish(shape, item, scratch.item, scratch);
      }
    }
  }
  return 0;
}

int64_t vs_step(const Layer* layer, const StepCall* call) {
  try {
    return step(*layer, *call);
  } catch (const std::bad_alloc&) {
    return -1;  // no exception may leave a function of C
  }
}
