// A fixed set of threads that meet thousands of times a second.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace irq {

// `run` hands one function to all threads and returns when all have finished; between two runs only the
// caller's code runs. Waiting threads spin for some microseconds (the gap between two matrices), then
// sleep (the gap between two tokens). Bodies must not throw. Not usable in a forked child.
class ThreadPool {
public:
    explicit ThreadPool(unsigned threads);  // the caller is one of them
    ~ThreadPool();
    ThreadPool(const ThreadPool &) = delete;
    ThreadPool &operator=(const ThreadPool &) = delete;

    unsigned size() const { return static_cast<unsigned>(workers_.size()) + 1; }

    // body(thread) on every thread, 0 being the caller's.
    template <typename Body>
    void run(const Body &body) {
        run_erased([](const void *b, unsigned thread) { (*static_cast<const Body *>(b))(thread); }, &body);
    }

    // body(item, thread) for every item in [0, count), handed out in order to whoever is free.
    template <typename Body>
    void for_each(std::size_t count, const Body &body) {
        if (count <= 1 || workers_.empty()) {
            for (std::size_t item = 0; item < count; ++item) body(item, 0U);
            return;
        }
        next_.store(0, std::memory_order_relaxed);
        run([&](unsigned thread) {
            for (;;) {
                const std::size_t item = next_.fetch_add(1, std::memory_order_relaxed);
                if (item >= count) return;
                body(item, thread);
            }
        });
    }

private:
    using Function = void (*)(const void *body, unsigned thread);

    void run_erased(Function function, const void *body);
    void work(unsigned thread);

    std::vector<std::thread> workers_;
    Function function_ = nullptr;
    const void *body_ = nullptr;
    bool stop_ = false;
    alignas(64) std::atomic<std::uint32_t> epoch_{0};    // counts runs
    alignas(64) std::atomic<std::uint32_t> running_{0};  // workers not yet finished
    alignas(64) std::atomic<std::size_t> next_{0};       // of for_each
    std::atomic<std::uint32_t> sleepers_{0};             // workers asleep or about to be
    std::atomic<bool> caller_sleeps_{false};
    std::mutex mutex_;
    std::condition_variable work_, done_;
};

}  // namespace irq
