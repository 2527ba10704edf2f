// Trains a byte language model on text files: see docs/training.md, or --help.

#include <fmt/format.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <climits>
#include <csignal>
#include <cstdlib>
#include <exception>
#include <string_view>

#include "training/options.hpp"
#include "training/trainer.hpp"

namespace {

volatile std::sig_atomic_t stop_signal = 0;

void request_stop(int signal) { stop_signal = signal; }

/// The first Ctrl-C asks for a checkpoint; a second one, or a second SIGTERM, ends the process at
/// once.
void catch_signals() {
  struct sigaction action = {};
  action.sa_handler = request_stop;
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

/// Every step needs the same memory again. Given back to the system in between, it would have to be
/// cleared page by page: a tenth of a step in bf16.
void keep_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the most that glibc takes
  mallopt(M_TRIM_THRESHOLD, INT_MAX);
  mallopt(M_TOP_PAD, 256 << 20);
#endif
}

}  // namespace

int main(int argc, char** argv) {
  keep_memory();
  try {
    training::Trainer trainer(training::parse_options(argc, argv));
    catch_signals();
    const auto outcome = trainer.run([] { return stop_signal != 0; });
    const bool interrupted = outcome != training::Outcome::kFinished && stop_signal != 0;
    return interrupted ? 128 + stop_signal : EXIT_SUCCESS;
  } catch (const std::exception& error) {
    // LibTorch's errors go on with a stack trace: the first line says it.
    const std::string_view message = error.what();
    fmt::print(stderr, "train_language_model: {}\n", message.substr(0, message.find('\n')));
    return EXIT_FAILURE;
  }
}
