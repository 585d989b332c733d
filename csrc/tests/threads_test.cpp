// Several threads that call at once, the number of threads or the instruction set changed meanwhile, and a fork.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "dispatch.h"
#include "matrices.h"
#include "ops.h"
#include "pool.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/wait.h>
#include <unistd.h>
#define FEWBIT_FORKS 1
#endif

namespace test {
namespace {

constexpr int kCallers = 3;
constexpr int kChanges = 60;

// A product and an attention to repeat, with what they gave when nothing else ran.
struct Job {
    Made made;
    std::vector<float> x, y;
    int64_t tokens;

    Job(int seed, int64_t tokens_) : tokens(tokens_) {
        Random random(static_cast<uint64_t>(100 + seed));
        made = make_matrix({300, {{90, 64, seed % 2 ? 4 : 5, 1, 3, true}}, false}, random);
        x = random.values(tokens * 300);
        fewbit::set_threads(1);
        y = product_of(made, x, tokens);
    }
    bool same() const {
        const std::vector<float> again = product_of(made, x, tokens);
        return same_bits(again.data(), y.data(), static_cast<int64_t>(y.size()));
    }
};

}  // namespace

std::string test_threads(int) {
    std::vector<Job> jobs;
    for (int i = 0; i < kCallers; ++i) jobs.emplace_back(i, 1 + 12 * i);
    fewbit::set_threads(2);
    std::atomic<bool> ended{false};
    std::atomic<bool> right{true};
    std::vector<std::thread> callers;
    for (const Job &job : jobs) {
        callers.emplace_back([&] {
            std::vector<float> norm(1000, 1.0f), weight(10, 1.0f), out(1000);
            while (!ended) {
                if (!job.same()) right = false;
                fewbit::rms_norm_rows(norm.data(), weight.data(), out.data(), 100, 10, 0.0f);
                if (out[999] != 1.0f) right = false;
            }
        });
    }
    for (int i = 0; i < kChanges; ++i) {
        fewbit::set_threads(1 + i % 3);
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    ended = true;
    for (std::thread &caller : callers) caller.join();
    if (!right) fail("several callers at once: other results than alone");
    // every task runs once, whoever takes it
    for (int64_t tasks : {0, 1, 2, 3, 100, 5000}) {
        fewbit::set_threads(3);
        std::vector<std::atomic<int>> times(static_cast<size_t>(tasks));
        fewbit::parallel_for(tasks, [&](int64_t i) { ++times[static_cast<size_t>(i)]; });
        for (const auto &t : times) {
            if (t != 1) fail(say("of %lld tasks, one ran %d times", static_cast<long long>(tasks), t.load()));
        }
    }
    return say("%d callers, %d changes of the number of threads", kCallers, kChanges);
}

// Another thread chooses the instruction set again and again: each product is wholly one set's.
std::string test_switches(int) {
    std::vector<std::string> names;
    for (const auto &[name, missing] : fewbit::instruction_sets()) {
        if (missing.empty()) names.push_back(name);
    }
    const std::string chosen = fewbit::kernels().name;
    Random random(99);
    // many blocks, of 8 bits: there the sets differ in what a sum starts from
    const Made made = make_matrix({96, std::vector<BlockSpec>(12, {16, 32, 8, 1, 128, false}), false}, random);
    const std::vector<float> x = random.values(96);
    std::vector<std::vector<float>> expected;
    for (const std::string &name : names) {
        fewbit::select(name);
        expected.push_back(product_of(made, x, 1));
    }
    fewbit::set_threads(1);
    std::atomic<bool> ended{false};
    std::thread switches([&] {
        for (size_t i = 0; !ended; ++i) fewbit::select(names[i % names.size()]);
    });
    bool right = true;
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
    int64_t count = 0;
    for (; right && std::chrono::steady_clock::now() < end; ++count) {
        const std::vector<float> y = product_of(made, x, 1);
        right = std::find(expected.begin(), expected.end(), y) != expected.end();
    }
    ended = true;
    switches.join();
    fewbit::select(chosen);
    if (!right) fail("a product of several instruction sets, switched on the way");
    return say("%zu sets, %lld products", names.size(), static_cast<long long>(count));
}

std::string test_fork(int) {
#if defined(FEWBIT_FORKS)
    const Job job(7, 5);
    for (int round = 0; round < 3; ++round) {
        fewbit::set_threads(3);
        if (!job.same()) fail("before the fork");
        const pid_t child = fork();
        if (child < 0) fail("fork");
        if (child == 0) {
            // the workers stayed behind in the parent; a hang here ends by the alarm
            alarm(30);
            bool right = job.same();
            fewbit::set_threads(2);
            right = job.same() && right;
            _exit(right ? 0 : 1);
        }
        if (!job.same()) fail("the parent after the fork");
        int status = 0;
        if (waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != 0) {
            fail(say("a forked child's products: status %d", status));
        }
    }
    return "3 children";
#else
    return "none here";
#endif
}

}  // namespace test
