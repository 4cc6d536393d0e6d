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

// `for_each` shares work out and returns when it is done; between two calls only the caller's code runs.
// Waiting threads spin for some microseconds (the gap between two matrices), then sleep (the gap between
// two tokens). A worker the system does not let run is not waited for: the caller does the work itself,
// so a crowded machine slows the engine down only by its share. Not usable in a forked child.
class ThreadPool {
public:
    // The caller is one of them. Error: the system does not give so many.
    explicit ThreadPool(unsigned threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool &) = delete;
    ThreadPool &operator=(const ThreadPool &) = delete;

    unsigned size() const { return static_cast<unsigned>(workers_.size()) + 1; }

    // body(item, thread) for every item in [0, count), handed out in order to whoever is free; the
    // caller is thread 0. The body must not throw.
    template <typename Body>
    void for_each(std::size_t count, const Body &body) {
        if (count <= 1 || workers_.empty()) {
            for (std::size_t item = 0; item < count; ++item) body(item, 0U);
            return;
        }
        next_.store(0, std::memory_order_relaxed);
        const auto take_all = [&](unsigned thread) {
            for (;;) {
                const std::size_t item = next_.fetch_add(1, std::memory_order_relaxed);
                if (item >= count) return;
                body(item, thread);
            }
        };
        using TakeAll = decltype(take_all);
        run([](const void *b, unsigned thread) { (*static_cast<const TakeAll *>(b))(thread); }, &take_all);
    }

private:
    using Function = void (*)(const void *body, unsigned thread);

    void run(Function function, const void *body);
    void work(unsigned thread);
    void stop();

    std::vector<std::thread> workers_;
    Function function_ = nullptr;
    const void *body_ = nullptr;
    // The gate to the work: number of the run (high half), whether workers may join it (`open`), and how
    // many have joined and not left.
    static constexpr std::uint64_t run_unit = std::uint64_t{1} << 32, open = std::uint64_t{1} << 31;
    alignas(64) std::atomic<std::uint64_t> gate_{0};
    alignas(64) std::atomic<std::size_t> next_{0};  // item
    alignas(64) std::atomic<std::uint32_t> sleepers_{0};  // workers asleep or about to be
    std::atomic<bool> caller_sleeps_{false}, stop_{false};
    std::mutex mutex_;
    std::condition_variable work_, done_;
};

}  // namespace irq
