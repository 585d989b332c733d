#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(FEWBIT_X86)
#include <immintrin.h>
#endif

namespace fewbit {
namespace {

// Between two products of one decoding step lie some 10 us; a worker that slept would need as long to wake.
constexpr auto kSpin = std::chrono::microseconds(50);
// Pauses before a waiting caller offers its core to others.
constexpr int kPausesBeforeYield = 4096;
// The ticket counts tasks in 32 bits.
constexpr int64_t kMostTasks = int64_t{1} << 30;

void pause() {
#if defined(FEWBIT_X86)
    _mm_pause();
#else
    std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// The ticket holds the number of the job (high half) and its tasks not yet taken (low half). Whoever lowers it by one
// owns a task of that very job, and the job can't end, nor its fields change, before that task is done. A worker that
// wakes late finds no task and touches nothing.
class Pool {
  public:
    // Fewer threads where the system grants no more (limits on processes or memory): those that run are kept.
    explicit Pool(int threads) {
        try {
            for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
        } catch (const std::system_error &) {
        } catch (const std::bad_alloc &) {
        }
    }

    ~Pool() {
        stop_.store(true);
        {
            std::lock_guard lock(sleep_mutex_);
        }
        wake_.notify_all();
        for (auto &worker : workers_) worker.join();
    }

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    // False when another thread is using the pool.
    bool run(int64_t tasks, TaskFunction fn, void *context) {
        std::unique_lock busy(run_mutex_, std::try_to_lock);
        if (!busy) return false;
        fn_ = fn;
        context_ = context;
        tasks_ = tasks;
        done_.store(0, std::memory_order_relaxed);
        ++job_;
        ticket_.store(job_ << 32 | static_cast<uint64_t>(tasks));
        // either a worker about to sleep sees the ticket, or it is counted here
        if (sleepers_.load() > 0) {
            {
                std::lock_guard lock(sleep_mutex_);
            }
            wake_.notify_all();
        }
        take_tasks();
        for (int pauses = 0; done_.load(std::memory_order_acquire) != tasks;) {
            pause();
            if (++pauses >= kPausesBeforeYield) std::this_thread::yield();
        }
        return true;
    }

  private:
    bool has_work() const { return static_cast<uint32_t>(ticket_.load()) != 0; }

    void take_tasks() {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        while (static_cast<uint32_t>(ticket) != 0) {
            if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) continue;
            fn_(context_, tasks_ - static_cast<int64_t>(static_cast<uint32_t>(ticket)));
            done_.fetch_add(1, std::memory_order_release);
            ticket = ticket_.load(std::memory_order_acquire);
        }
    }

    void work() {
        while (!stop_.load()) {
            take_tasks();
            const auto until = std::chrono::steady_clock::now() + kSpin;
            while (!has_work() && !stop_.load(std::memory_order_relaxed) && std::chrono::steady_clock::now() < until) {
                for (int i = 0; i < 16; ++i) pause();
            }
            if (has_work()) continue;
            std::unique_lock lock(sleep_mutex_);
            sleepers_.fetch_add(1);
            wake_.wait(lock, [this] { return has_work() || stop_.load(); });
            sleepers_.fetch_sub(1);
        }
    }

    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int64_t> done_{0};
    alignas(64) TaskFunction fn_ = nullptr;
    void *context_ = nullptr;
    int64_t tasks_ = 0;
    uint64_t job_ = 0;
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    std::mutex run_mutex_;
    std::mutex sleep_mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
};

// What the process shares. It is never destroyed: workers may still sleep in it while the process exits.
struct Shared {
    // readers use the pool, set_threads replaces it
    std::mutex mutex;
    std::shared_ptr<Pool> pool;
};

std::atomic<Shared *> g_shared{new Shared};
std::atomic<int> g_threads{1};

// A forked child has none of the workers and perhaps a locked mutex: it starts afresh and leaks the parent's state.
void forget_after_fork() { g_shared.store(new Shared); }

std::shared_ptr<Pool> current_pool() {
    Shared &shared = *g_shared.load();
    std::lock_guard lock(shared.mutex);
    if (!shared.pool) {
#if defined(__unix__) || defined(__APPLE__)
        static std::once_flag once;
        std::call_once(once, [] { pthread_atfork(nullptr, nullptr, forget_after_fork); });
#endif
        shared.pool = std::make_shared<Pool>(g_threads.load());
        g_threads.store(shared.pool->threads());
    }
    return shared.pool;
}

}  // namespace

void set_threads(int n) {
    n = std::max(1, n);
    Shared &shared = *g_shared.load();
    std::shared_ptr<Pool> old;
    {
        std::lock_guard lock(shared.mutex);
        if (g_threads.load() == n) return;
        g_threads.store(n);
        // made anew at the next use; whoever still runs in the old one keeps it until done
        old = std::move(shared.pool);
    }
}

int threads() { return g_threads.load(); }

void run_tasks(int64_t tasks, TaskFunction fn, void *context) {
    if (tasks > 1 && tasks < kMostTasks && g_threads.load(std::memory_order_relaxed) > 1 &&
        current_pool()->run(tasks, fn, context)) {
        return;
    }
    for (int64_t i = 0; i < tasks; ++i) fn(context, i);
}

}  // namespace fewbit
