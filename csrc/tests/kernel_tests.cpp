// Runs the native tests on every instruction set that this CPU has.
//   kernel_tests [--sets NAME,NAME,...]     fails where others, or fewer, can run than those named, best last
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

void run_all(const std::string &name) {
    const struct {
        const char *name;
        std::string (*run)();
    } tests[] = {{"products", test::test_products}, {"extremes", test::test_extremes},
                 {"long rows", test::test_long_rows}, {"ops", test::test_ops},
                 {"attention", test::test_attention}, {"threads", test::test_threads},
                 {"fork", test::test_fork}};
    for (const auto &t : tests) {
        fewbit::set_threads(2);
        const auto begin = std::chrono::steady_clock::now();
        const std::string covered = t.run();
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
        std::printf("%-13s %-10s %s (%.1f s)\n", name.c_str(), t.name, covered.c_str(), took.count());
        std::fflush(stdout);
    }
}

}  // namespace

#if defined(FEWBIT_WATCHED)
// the test of fork starts threads in the child, as users of multiprocessing do
extern "C" const char *__tsan_default_options() { return "die_after_fork=0"; }
#endif

int main(int count, char **arguments) {
    const std::string sets = runnable();
    if (count == 3 && std::string(arguments[1]) == "--sets") {
        if (sets != arguments[2]) test::fail("these run: " + sets + "; expected: " + arguments[2]);
    } else if (count != 1) {
        test::fail("usage: kernel_tests [--sets NAME,NAME,...]");
    }
    if (sets.substr(sets.rfind(',') + 1) != fewbit::kernels().name) test::fail("the best is not the default");
    for (const auto &[name, missing] : fewbit::instruction_sets()) {
        if (!missing.empty()) continue;
        fewbit::select(name);
        if (name != fewbit::kernels().name) test::fail(name + " was selected and is not in use");
        run_all(name);
    }
    std::printf("all passed on %s\n", sets.c_str());
}
