#include "irq/threads.h"

namespace irq {
namespace {

constexpr int spins = 4000;  // tens of microseconds

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

template <typename Condition>
bool spin_until(const Condition &condition) {
    for (int i = 0; i < spins; ++i) {
        if (condition()) return true;
        pause();
    }
    return condition();
}

}  // namespace

ThreadPool::ThreadPool(unsigned threads) {
    for (unsigned thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
}

ThreadPool::~ThreadPool() {
    stop_ = true;
    epoch_.fetch_add(1);
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        work_.notify_all();
    }
    for (std::thread &worker : workers_) worker.join();
}

// Going to sleep and waking up are both sequentially consistent "announce, then look": of a sleeper that
// announces itself and a waker that changes the state, at least one sees the other.
void ThreadPool::run_erased(Function function, const void *body) {
    if (workers_.empty()) {
        function(body, 0);
        return;
    }
    function_ = function;
    body_ = body;
    running_.store(static_cast<std::uint32_t>(workers_.size()), std::memory_order_relaxed);
    epoch_.fetch_add(1);
    if (sleepers_.load() > 0) {
        const std::lock_guard<std::mutex> lock(mutex_);
        work_.notify_all();
    }
    function(body, 0);
    const auto finished = [this] { return running_.load() == 0; };
    if (spin_until(finished)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    caller_sleeps_.store(true);
    done_.wait(lock, finished);
    caller_sleeps_.store(false);
}

void ThreadPool::work(unsigned thread) {
    std::uint32_t seen = 0;
    for (;;) {
        const auto called = [this, seen] { return epoch_.load() != seen; };
        if (!spin_until(called)) {
            std::unique_lock<std::mutex> lock(mutex_);
            sleepers_.fetch_add(1);
            work_.wait(lock, called);
            sleepers_.fetch_sub(1);
        }
        ++seen;
        if (stop_) return;
        function_(body_, thread);
        if (running_.fetch_sub(1) == 1 && caller_sleeps_.load()) {
            const std::lock_guard<std::mutex> lock(mutex_);
            done_.notify_one();
        }
    }
}

}  // namespace irq
