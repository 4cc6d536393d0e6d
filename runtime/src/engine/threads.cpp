#include "irq/threads.h"

#include <system_error>

#include "irq/error.h"

namespace irq {
namespace {

constexpr int spins = 2000;  // tens of microseconds

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
    try {
        for (unsigned thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
    } catch (const std::system_error &error) {
        const std::size_t started = workers_.size();
        stop();
        throw Error(Fault::usage, "the system gives no more threads", "", show(threads) + " threads",
                    show(started + 1) + " (" + error.what() + ")", "Ask for fewer threads");
    } catch (...) {
        stop();  // no destructor runs for what was never finished
        throw;
    }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
    stop_.store(true);
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        work_.notify_all();
    }
    for (std::thread &worker : workers_) worker.join();
}

// Going to sleep and waking up are both sequentially consistent "announce, then look": of a sleeper that
// announces itself and a waker that changes the state, at least one sees the other.
void ThreadPool::run(Function function, const void *body) {
    function_ = function;  // nobody has joined: nobody reads
    body_ = body;
    gate_.store((gate_.load() / run_unit + 1) * run_unit + open);
    if (sleepers_.load() > 0) {
        const std::lock_guard<std::mutex> lock(mutex_);
        work_.notify_all();
    }
    function(body, 0);
    gate_.fetch_sub(open);
    const auto all_left = [this] { return gate_.load() % open == 0; };
    if (spin_until(all_left)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    caller_sleeps_.store(true);
    done_.wait(lock, all_left);
    caller_sleeps_.store(false);
}

void ThreadPool::work(unsigned thread) {
    std::uint64_t last_run = 0;
    const auto called = [&] {
        const std::uint64_t gate = gate_.load();
        return stop_.load() || (gate / run_unit != last_run && (gate & open) != 0);
    };
    for (;;) {
        if (!spin_until(called)) {
            std::unique_lock<std::mutex> lock(mutex_);
            sleepers_.fetch_add(1);
            work_.wait(lock, called);
            sleepers_.fetch_sub(1);
        }
        if (stop_.load()) return;
        std::uint64_t gate = gate_.load();
        if ((gate & open) == 0 || !gate_.compare_exchange_strong(gate, gate + 1)) continue;  // late: look again
        last_run = gate / run_unit;
        function_(body_, thread);
        const std::uint64_t before = gate_.fetch_sub(1);
        if (before % open == 1 && (before & open) == 0 && caller_sleeps_.load()) {
            const std::lock_guard<std::mutex> lock(mutex_);
            done_.notify_one();
        }
    }
}

}  // namespace irq
