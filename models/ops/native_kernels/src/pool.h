// Threads that share the pieces of one job at a time with the thread that asks.
#pragma once
#include <cstdint>

namespace jaxserve {

// Calls `piece(context, i)` for i in 0 .. count - 1, each once, on this thread and the others, and
// returns when all are done. Which thread takes which piece is not fixed, so no result may depend
// on it. While another thread's job runs, this one's runs on the calling thread alone.
void run_pieces(int64_t count, void (*piece)(void* context, int64_t index), void* context);

template <typename Piece>
void parallel_for(int64_t count, Piece&& piece) {
  run_pieces(
      count, [](void* context, int64_t i) { (*static_cast<Piece*>(context))(i); }, &piece);
}

// Threads that later jobs use, the asking one included; at least one.
void set_num_threads(int64_t num_threads);
int64_t get_num_threads();

}  // namespace jaxserve
