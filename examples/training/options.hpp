#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "adamw.hpp"
#include "fastweights/nn/config.hpp"
#include "schedule.hpp"

namespace training {

/// Everything that the command line decides.
struct Options {
  std::vector<std::filesystem::path> texts;
  std::vector<std::filesystem::path> held_out;
  std::filesystem::path output;
  std::filesystem::path from;  ///< model folder whose weights training starts from; empty: none
  std::string command;         ///< as it was given, for the log
  bool resume = false;
  bool overwrite = false;

  fastweights::nn::LanguageModelConfig model;

  int64_t batch = 8;
  int64_t segment = 512;
  int64_t accumulation = 1;  ///< turns in which a worker takes its rows
  double reset_probability = 0.02;
  double repeat_probability = 0.0;
  int64_t steps = 0;       ///< 0: no limit
  double seconds = 0.0;    ///< 0: no limit
  int64_t stop_after = 0;  ///< steps of this run, of which there may be several; 0: no limit
  Schedule schedule;
  AdamWOptions optimizer;
  bool bf16 = false;
  int threads = 1;  ///< workers, each with its share of the batch
  uint64_t seed = 0;

  int64_t log_every = 10;          ///< steps
  int64_t evaluate_every = 500;    ///< steps; 0: only at the end
  int64_t evaluate_bytes = 65536;  ///< of each held-out work, while training
  double checkpoint_seconds = 300.0;
};

/// Reads the command line. Prints help or an error and ends the process where CLI11 says so;
/// throws `fastweights::Error` for a value that does not fit.
Options parse_options(int argc, char** argv);

/// What decides the trajectory, as JSON. `texts_digest` is that of the training texts.
std::string recipe(const Options& options, const std::string& texts_digest);

/// The settings in which a resumed run differs from its checkpoint, one line each. Throws
/// `fastweights::StateMismatch` for one without which it cannot go on (model, texts, batch).
std::vector<std::string> changed_settings(const std::string& checkpoint, const std::string& now);

}  // namespace training
