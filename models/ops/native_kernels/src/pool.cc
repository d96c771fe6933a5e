#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace jaxserve {
namespace {

// A worker looks for the next job for so long before it sleeps: longer than the gaps between the
// products of one layer, far shorter than a scheduler's time slice.
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int64_t kMaxPieces = (1 << 20) - 1;

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// The job's number, its count of pieces and the next piece in one word, so that a piece is taken
// with all three known to belong together: 24, 20 and 20 bits.
struct Ticket {
  uint64_t word;
  uint64_t job() const { return word >> 40; }
  uint64_t count() const { return (word >> 20) & kMaxPieces; }
  uint64_t next() const { return word & kMaxPieces; }
};

class Pool {
 public:
  void run(int64_t count, void (*piece)(void*, int64_t), void* context) {
    std::unique_lock<std::mutex> alone(running_, std::try_to_lock);
    if (!alone.owns_lock() || num_threads_.load() <= 1 || count <= 1 || count > kMaxPieces) {
      for (int64_t i = 0; i < count; ++i) piece(context, i);
      return;
    }
    start_workers();
    piece_ = piece;
    context_ = context;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t job = (Ticket{word_.load()}.job() + 1) & 0xffffff;
    word_.store(job << 40 | static_cast<uint64_t>(count) << 20);
    if (num_sleeping_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    take_pieces();
    for (int spins = 0; done_.load(std::memory_order_acquire) < count; ++spins) {
      // The last piece's thread may have lost its core to another process.
      if (spins < 2000) pause_briefly(); else std::this_thread::yield();
    }
  }

  void set_num_threads(int64_t num_threads) {
    std::lock_guard<std::mutex> alone(running_);
    num_threads_.store(num_threads < 1 ? 1 : num_threads);
  }
  int64_t num_threads() const { return num_threads_.load(); }

 private:
  void start_workers() {
    for (; num_workers_ < num_threads_.load() - 1; ++num_workers_)
      std::thread(&Pool::work, this, num_workers_).detach();
  }

  void take_pieces() {
    uint64_t word = word_.load();
    while (Ticket{word}.next() < Ticket{word}.count()) {
      if (!word_.compare_exchange_weak(word, word + 1)) continue;
      // The job cannot end, nor another begin, before this piece is done.
      piece_(context_, static_cast<int64_t>(Ticket{word}.next()));
      done_.fetch_add(1, std::memory_order_release);
      word = word_.load();
    }
  }

  void work(int64_t index) {
    uint64_t seen = ~uint64_t{0};
    while (true) {
      seen = wait_for_job(seen);
      if (index < num_threads_.load() - 1) take_pieces();
    }
  }

  uint64_t wait_for_job(uint64_t seen) {
    const auto give_up = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 16; ++i) {
        const uint64_t job = Ticket{word_.load()}.job();
        if (job != seen) return job;
        pause_briefly();
      }
    } while (std::chrono::steady_clock::now() < give_up);
    std::unique_lock<std::mutex> lock(sleep_);
    num_sleeping_.fetch_add(1);
    wake_.wait(lock, [&] { return Ticket{word_.load()}.job() != seen; });
    num_sleeping_.fetch_sub(1);
    return Ticket{word_.load()}.job();
  }

  std::mutex running_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> word_{0};
  std::atomic<int64_t> done_{0}, num_sleeping_{0}, num_threads_{1};
  int64_t num_workers_ = 0;
  void (*piece_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
};

Pool& pool() {
  // Never destroyed: its threads wait in it until the process ends.
  static Pool* const the_pool = new Pool;
  return *the_pool;
}

}  // namespace

void run_pieces(int64_t count, void (*piece)(void*, int64_t), void* context) {
  pool().run(count, piece, context);
}
void set_num_threads(int64_t num_threads) { pool().set_num_threads(num_threads); }
int64_t get_num_threads() { return pool().num_threads(); }

}  // namespace jaxserve
