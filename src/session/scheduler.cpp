#include "scheduler.hpp"

#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cstddef>
#include <optional>
#include <utility>

#include "fastweights/core/error.hpp"
#include "session_steps.hpp"

namespace fastweights::detail {
namespace {

/// How often a waiting caller polls.
constexpr std::chrono::milliseconds kPollEvery{50};

}  // namespace

/// A read or a write under way; lives on its caller's stack. The flags are changed under the lock,
/// the rest by the scheduler, or by the caller while it is asked.
struct Scheduler::Job {
  Session& session;
  std::string_view text = {};  // of a read
  std::size_t done = 0;        // bytes of it that were read
  Writing* writing = nullptr;  // of a write
  bool asks = false;           // its caller wants to be asked after each step
  bool asking = false;         // and is
  bool stopped = false;        // its caller wants it to end
  bool over = false;
  std::exception_ptr error = {};
  std::condition_variable changed = {};
};

Scheduler::Scheduler(std::shared_ptr<const nn::LanguageModelImpl> model,
                     std::int64_t most_per_batch, std::function<void()> poll)
    : model_(std::move(model)),
      most_per_batch_(static_cast<std::size_t>(most_per_batch)),
      poll_(std::move(poll)),
      threads_(at::get_num_threads()),
      thread_([this] { loop(); }) {}

Scheduler::~Scheduler() {
  {
    const Lock lock(mutex_);
    ending_ = true;
    wake_.notify_one();
  }
  thread_.join();
}

void Scheduler::stop() {
  const Lock lock(mutex_);
  stopping_ = true;
  wake_.notify_one();
}

Scheduler::Counts Scheduler::counts() const {
  const Lock lock(mutex_);
  return counts_;
}

// ---- the callers' side -------------------------------------------------------------------------

void Scheduler::read(Session& session, std::string_view text, const Progress& progress) {
  if (text.empty()) return;
  Job job{.session = session, .text = text, .asks = static_cast<bool>(progress)};
  const auto ask = [&] {
    return progress(static_cast<std::int64_t>(job.done), static_cast<std::int64_t>(text.size()));
  };
  const std::exception_ptr thrown = run(job, readers_, ask);
  if (thrown) std::rethrow_exception(thrown);
  if (job.error) std::rethrow_exception(job.error);
  if (job.done < text.size()) throw_stopped(job.done, text.size());
}

std::string Scheduler::write(Session& session, const WriteOptions& options) {
  if (options.guess) {
    throw Error("session pool: guess is called by lone sessions only; ahead works without it");
  }
  Writing writing(session, options);
  Job job{.session = session, .writing = &writing, .asks = writing.wants_to_ask()};
  const auto ask = [&] {
    writing.ask();
    return true;  // the writing itself knows
  };
  const std::exception_ptr thrown = run(job, writers_, ask);
  if (job.error) std::rethrow_exception(job.error);
  const bool complete = writing.is_over();
  std::string text = writing.finish(session);
  if (thrown) std::rethrow_exception(thrown);
  if (!complete) {
    throw Cancelled("session pool: a write was stopped after " + std::to_string(text.size()) +
                    " tokens");
  }
  return text;
}

/// Hands a job to the thread and waits for its end; returns what a callback has thrown.
std::exception_ptr Scheduler::run(Job& job, Jobs& jobs, const std::function<bool()>& ask) {
  std::exception_ptr thrown;
  Lock lock(mutex_);
  jobs.push_back(&job);
  wake_.notify_one();
  while (!job.over) {
    if (job.asking) {
      lock.unlock();
      bool more = false;
      try {
        more = ask();
      } catch (...) {
        thrown = std::current_exception();
      }
      lock.lock();
      job.asking = false;
      job.stopped = job.stopped || !more;
      wake_.notify_one();
    } else if (!poll_ || thrown) {
      job.changed.wait(lock);
    } else if (job.changed.wait_for(lock, kPollEvery) == std::cv_status::timeout) {
      poll(job, lock, thrown);
    }
  }
  return thrown;
}

void Scheduler::poll(Job& job, Lock& lock, std::exception_ptr& thrown) {
  lock.unlock();
  try {
    poll_();
  } catch (...) {
    thrown = std::current_exception();
  }
  lock.lock();
  if (!thrown) return;
  job.stopped = true;
  wake_.notify_one();
}

// ---- the thread's side -------------------------------------------------------------------------

bool Scheduler::is_ready(const Job* job) { return !job->asking; }

void Scheduler::end(Job& job) {
  job.over = true;
  job.changed.notify_one();
}

void Scheduler::ask(Job& job) {
  job.asking = true;
  job.changed.notify_one();
}

bool Scheduler::anyone_waits() const {
  return std::ranges::any_of(readers_, is_ready) || std::ranges::any_of(writers_, is_ready);
}

void Scheduler::loop() {
  at::set_num_threads(threads_);
  const c10::InferenceMode guard;
  Lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return ending_ || anyone_waits(); });
    if (ending_) return;
    retire();
    const bool writers = std::ranges::any_of(writers_, is_ready);
    const bool readers = std::ranges::any_of(readers_, is_ready);
    if (readers && (!writers || owed_ <= Clock::duration::zero())) {
      read_piece(lock);
    } else if (writers) {
      await_company(lock);
      write_tokens(lock);
    }
  }
}

/// Ends what is to end between two steps.
void Scheduler::retire() {
  const auto retire_from = [&](Jobs& jobs) {
    std::erase_if(jobs, [&](Job* job) {
      const bool complete = job->writing == nullptr && job->done == job->text.size();
      const bool gone = !job->asking && (job->stopped || stopping_ || complete);
      if (gone) end(*job);
      return gone;
    });
  };
  retire_from(readers_);
  retire_from(writers_);
}

/// Waits a little for writers that are being asked: a step costs less for all than one by one.
void Scheduler::await_company(Lock& lock) {
  wake_.wait_until(lock, last_end_ + last_step_ / 2,
                   [&] { return ending_ || std::ranges::all_of(writers_, is_ready); });
  retire();
}

/// The writers whose turn it is; they go to the end of the line.
Scheduler::Jobs Scheduler::take_batch() {
  Jobs batch;
  std::erase_if(writers_, [&](Job* job) {
    const bool taken = is_ready(job) && batch.size() < most_per_batch_;
    if (taken) batch.push_back(job);
    return taken;
  });
  writers_.insert(writers_.end(), batch.begin(), batch.end());
  return batch;
}

/// Runs a step of a job; what it throws is its own caller's.
template <class Step>
void Scheduler::guarded(Job& job, Step step) {
  try {
    step();
  } catch (...) {
    job.error = std::current_exception();
  }
}

void Scheduler::write_tokens(Lock& lock) {
  const Jobs batch = take_batch();
  lock.unlock();
  const auto begin = Clock::now();
  std::vector<WrittenToken> tokens;
  Jobs going;
  Jobs over;
  for (Job* job : batch) {
    std::optional<WrittenToken> token;
    guarded(*job, [&] { token = job->writing->draw(); });
    (token ? going : over).push_back(job);
    if (token) tokens.push_back(*token);
  }
  accept(tokens, going);
  lock.lock();
  last_end_ = Clock::now();
  last_step_ = last_end_ - begin;
  owed_ -= last_step_;
  counts_.batches += going.empty() ? 0 : 1;
  counts_.tokens += std::ssize(going);
  for (Job* job : going) {
    if (job->error || (!job->asks && job->writing->is_over())) {
      over.push_back(job);
    } else if (job->asks) {
      ask(*job);
    }
  }
  for (Job* job : over) {
    std::erase(writers_, job);
    end(*job);
  }
}

/// Reads a token of each job, and takes it into the job's text.
void Scheduler::accept(const std::vector<WrittenToken>& tokens, const Jobs& jobs) {
  if (jobs.empty()) return;
  try {
    Replay::write_each(*model_, tokens);
  } catch (...) {
    for (Job* job : jobs) job->error = std::current_exception();
    return;
  }
  for (Job* job : jobs) {
    guarded(*job, [&] { job->writing->accept(); });
  }
}

void Scheduler::read_piece(Lock& lock) {
  const auto next = std::ranges::find_if(readers_, is_ready);
  std::rotate(next, next + 1, readers_.end());
  Job& job = *readers_.back();
  lock.unlock();
  const auto begin = Clock::now();
  const auto piece = static_cast<std::size_t>(job.session.options().piece);
  guarded(job, [&] {
    SessionSteps::read_piece(job.session, job.text.substr(job.done, piece), job.done == 0);
    job.done = std::min(job.text.size(), job.done + piece);
  });
  lock.lock();
  owed_ = Clock::now() - begin;
  ++counts_.pieces;
  if (job.error) {
    std::erase(readers_, &job);
    end(job);
  } else if (job.asks) {
    ask(job);
  }
}

}  // namespace fastweights::detail
