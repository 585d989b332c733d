// Runs the native tests on every instruction set that this CPU has.
//   --sets NAME,NAME,...   fails where others can run than those named, in the order of dispatch.cpp
//   --best                 only the last of them
//   --every N              each Nth of the random shapes, where all take long; 5 or 7: each 6th has the same width
//   --no-fork              where an emulator or ThreadSanitizer can't start threads in a forked child
#include <algorithm>
#include <chrono>

#include "check.h"
#include "dispatch.h"
#include "pool.h"

namespace {

std::string runnable() {
    std::string names;
    for (const auto &[name, missing] : fewbit::instruction_sets()) {
        if (missing.empty()) {
            names += (names.empty() ? "" : ",") + name;
        } else {
            std::printf("%-13s does not run: %s\n", name.c_str(), missing.c_str());
        }
    }
    return names;
}

struct Options {
    std::string sets;
    bool best = false, fork = true;
    int every = 1;
};

Options options_of(int count, char **arguments) {
    Options o;
    for (int i = 1; i < count; ++i) {
        const std::string name = arguments[i];
        if (name == "--best") {
            o.best = true;
        } else if (name == "--no-fork") {
            o.fork = false;
        } else if (name == "--sets" && i + 1 < count) {
            o.sets = arguments[++i];
        } else if (name == "--every" && i + 1 < count) {
            o.every = std::max(1, std::atoi(arguments[++i]));
        } else {
            test::fail("usage: kernel_tests [--sets NAME,NAME,...] [--best] [--every N] [--no-fork]");
        }
    }
    return o;
}

void run_all(const std::string &name, const Options &options) {
    const struct {
        const char *name;
        std::string (*run)(int every);
    } tests[] = {{"products", test::test_products}, {"ggml products", test::test_ggml_products},
                 {"extremes", test::test_extremes},
                 {"long rows", test::test_long_rows}, {"ops", test::test_ops},
                 {"attention", test::test_attention}, {"layers", test::test_layers},
                 {"mapped", test::test_mapped}, {"checksum", test::test_checksum},
                 {"threads", test::test_threads}, {"switches", test::test_switches},
                 {"fork", test::test_fork}};
    for (const auto &t : tests) {
        if (!options.fork && t.run == test::test_fork) continue;
        fewbit::set_threads(2);
        const auto begin = std::chrono::steady_clock::now();
        const std::string covered = t.run(options.every);
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
        std::printf("%-13s %-10s %s (%.1f s)\n", name.c_str(), t.name, covered.c_str(), took.count());
        std::fflush(stdout);
    }
}

}  // namespace

int main(int count, char **arguments) {
    const Options options = options_of(count, arguments);
    const std::string sets = runnable(), best = sets.substr(sets.rfind(',') + 1);
    if (!options.sets.empty() && sets != options.sets) test::fail("these run: " + sets + "; expected: " + options.sets);
    if (best != fewbit::kernels().name) test::fail(best + " is the best here and not the default");
    for (const auto &[name, missing] : fewbit::instruction_sets()) {
        if (!missing.empty() || (options.best && name != best)) continue;
        fewbit::select(name);
        if (name != fewbit::kernels().name) test::fail(name + " was selected and is not in use");
        run_all(name, options);
    }
    std::printf("all passed on %s\n", (options.best ? best : sets).c_str());
}
