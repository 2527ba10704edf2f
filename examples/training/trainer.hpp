#pragma once

#include <chrono>
#include <filesystem>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "adamw.hpp"
#include "batch_stream.hpp"
#include "corpus.hpp"
#include "fastweights/nn/language_model.hpp"
#include "options.hpp"
#include "progress.hpp"
#include "run_log.hpp"
#include "workers.hpp"

namespace training {

enum class Outcome { kFinished, kInterrupted };

/// Trains a byte language model by truncated back-propagation through time: the fast-weight state
/// is carried over segments, its gradient is not.
///
/// A checkpoint is one safetensors file with the model, both moments of the optimizer, the state of
/// every row, the position in the data and both random generators; it is replaced atomically. A run
/// that is resumed from it takes the same steps as one that was never interrupted, bit for bit on
/// one machine with one thread setting. Alike, but not equal, are the steps with `--seconds`, where
/// the learning rate follows the clock.
class Trainer {
 public:
  /// Reads texts and, where asked for, the checkpoint. Throws `fastweights::Error`.
  explicit Trainer(Options options);

  /// Trains to the end of the budget, evaluates, writes the model folder. `stop` is asked between
  /// steps; where it says yes, and after `stop_after` steps, a checkpoint is left. Throws
  /// `fastweights::Error` where the loss is not finite (the last checkpoint is kept) or a file
  /// cannot be written.
  Outcome run(const std::function<bool()>& stop);

 private:
  struct Counters {
    int64_t step = 0;
    int64_t bytes = 0;
    double seconds = 0.0;  // up to the checkpoint that was loaded
    double bits = 0.0;     // summed since the last record
  };

  void prepare_output() const;
  void resume();
  void train_step();
  double backward(const Segment& segment);
  double backward_part(int worker, int64_t index, const Segment& segment,
                       const at::Tensor& memory_keep);
  int64_t parts() const { return options_.threads * options_.accumulation; }
  void record(double learning_rate, double norm);
  void show(double learning_rate);
  void evaluate(const std::function<bool()>& stop);
  bool finish(const std::function<bool()>& stop);
  nlohmann::json evaluate_whole_works(const std::function<bool()>& stop);
  void checkpoint();
  void periodic_checkpoint();

  double seconds() const;
  double progress() const;
  std::filesystem::path checkpoint_path() const;

  using Clock = std::chrono::steady_clock;

  Options options_;
  std::vector<Work> texts_, held_out_;
  std::string recipe_;
  fastweights::nn::LanguageModel model_;
  Replicas replicas_;
  AdamW optimizer_;
  BatchStream stream_;
  std::vector<fastweights::nn::LanguageModelState> states_;  // of each part of the batch
  Counters counters_;
  ProgressLine line_;
  std::optional<RunLog> log_;
  Clock::time_point start_ = Clock::now();
  Clock::time_point last_checkpoint_ = Clock::now();
  double progress_at_start_ = 0.0;
  double recent_bits_ = 0.0;   // smoothed, for the progress line
  double recent_speed_ = 0.0;  // smoothed bytes per second
};

}  // namespace training
