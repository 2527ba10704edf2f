#include "fastweights/session/session_pool.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <limits>
#include <map>
#include <mutex>
#include <set>
#include <system_error>
#include <thread>

#include "fastweights/core/error.hpp"
#include "fastweights/io/quote.hpp"
#include "fastweights/nn/language_model.hpp"
#include "option_checks.hpp"
#include "scheduler.hpp"
#include "session_steps.hpp"

namespace fastweights {
namespace {

namespace fs = std::filesystem;
using Lock = std::unique_lock<std::mutex>;
using Model = std::shared_ptr<const nn::LanguageModelImpl>;

constexpr std::size_t kLongestId = 80;

SessionPoolOptions checked(SessionPoolOptions options) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  detail::check_option("session pool", "memory_bytes", options.memory_bytes, 0, kMost);
  detail::check_option("session pool", "most_per_batch", options.most_per_batch, 1, 4096);
  return options;
}

[[noreturn]] void throw_ended() {
  throw Cancelled("session pool: the pool ended before the call had its turn");
}

/// The id as a file name: what is neither a letter nor a digit, `-` or `_` as its hexadecimal code.
std::string file_name(const std::string& id) {
  constexpr std::string_view kPlain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_";
  constexpr std::string_view kDigits = "0123456789ABCDEF";
  std::string out;
  for (const char c : id) {
    if (kPlain.find(c) != std::string_view::npos) {
      out += c;
      continue;
    }
    const auto code = static_cast<unsigned char>(c);
    out += {'%', kDigits[code >> 4], kDigits[code & 15]};
  }
  return out + ".fwstate";
}

/// A folder of its own in `parent`, which goes with it.
class OwnFolder {
 public:
  explicit OwnFolder(const fs::path& parent) {
    if (parent.empty()) return;
    if (mkdir(parent.c_str(), 0700) != 0 && errno != EEXIST) refuse(parent);
    std::string name = (parent / "pool-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) refuse(parent);
    path_ = name;
  }
  ~OwnFolder() {
    std::error_code ignored;
    if (!path_.empty()) fs::remove_all(path_, ignored);
  }
  OwnFolder(const OwnFolder&) = delete;
  OwnFolder& operator=(const OwnFolder&) = delete;

  bool exists() const { return !path_.empty(); }
  fs::path operator/(const std::string& name) const { return path_ / name; }

 private:
  [[noreturn]] static void refuse(const fs::path& parent) {
    throw FileError("session pool: no folder can be made in " + io::quote(parent.string()) + ": " +
                    std::strerror(errno));
  }

  fs::path path_;
};

}  // namespace

class SessionPool::Impl {
 public:
  using MakeSession = std::function<Session()>;

  Impl(Model model, const SessionPoolOptions& options)
      : options_(checked(options)),
        fresh_bytes_(detail::SessionSteps::bytes(Session(model, options.session))),
        model_(std::move(model)),
        folder_(options_.folder),
        scheduler_(model_, options_.most_per_batch, options_.poll) {}
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  /// Calls under way end; returns when all have left.
  void end();

  const Model& model() const { return model_; }
  const SessionPoolOptions& options() const { return options_; }
  std::int64_t fresh_bytes() const { return fresh_bytes_; }
  detail::Scheduler& scheduler() { return scheduler_; }

  void admit(const std::string& id, std::int64_t bytes, const MakeSession& make);
  void close(const std::string& id);
  /// Runs `work` when it is the call's turn, with the session in memory.
  template <class Work>
  auto with(const std::string& id, Work work);

  bool contains(const std::string& id) const;
  std::vector<std::string> ids() const;
  SessionPoolReport report() const;

 private:
  /// A session of the pool. Its session is used by the call that is first in line, everything else
  /// under the lock.
  struct Entry {
    explicit Entry(std::string name) : id(std::move(name)) {}

    std::string id;
    std::optional<Session> session;  // in memory
    bool on_disk = false;
    std::int64_t bytes = 0;  // in memory, at the end of the last call
    std::uint64_t used = 0;  // when that was
    std::deque<int*> line;   // who has a call on it, in order
    bool saving = false;     // on its way to disk
    bool closed = false;

    bool is_idle() const { return session && line.empty() && !saving; }
  };
  using EntryPointer = std::shared_ptr<Entry>;

  class Visit;
  class Turn;

  EntryPointer find(const std::string& id) const;
  void bring(Lock& lock, Entry& entry);
  void put(Lock& lock, Entry& entry, std::int64_t bytes, const MakeSession& make);
  void make_room(Lock& lock, std::int64_t bytes);
  EntryPointer least_recently_used() const;
  void spill(Lock& lock, const EntryPointer& entry);
  void shrink(Lock& lock);
  void drop(Entry& entry);

  const SessionPoolOptions options_;
  const std::int64_t fresh_bytes_;
  const Model model_;
  const OwnFolder folder_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;  // a line, a session's place, room, visitors
  std::map<std::string, EntryPointer> entries_;
  std::set<std::thread::id> visitors_;  // threads with a call under way
  std::deque<std::int64_t*> wanted_;    // bytes that calls wait for room for, in order
  std::int64_t resident_bytes_ = 0;     // of sessions in memory, or on their way there
  std::int64_t residents_ = 0;
  std::uint64_t clock_ = 0;
  std::int64_t saves_ = 0;
  std::int64_t loads_ = 0;
  bool stopping_ = false;
  detail::Scheduler scheduler_;
};

/// A call on the pool, from its begin to its end.
class SessionPool::Impl::Visit {
 public:
  explicit Visit(Impl& pool) : pool_(pool) {
    const Lock lock(pool_.mutex_);
    if (pool_.stopping_) throw_ended();
    if (!pool_.visitors_.insert(std::this_thread::get_id()).second) {
      throw Error("session pool: a callback must not call the pool that called it");
    }
  }
  ~Visit() {
    const Lock lock(pool_.mutex_);
    pool_.visitors_.erase(std::this_thread::get_id());
    pool_.changed_.notify_all();
  }
  Visit(const Visit&) = delete;
  Visit& operator=(const Visit&) = delete;

 private:
  Impl& pool_;
};

/// A place in the line for a session; the constructor waits until it is the first.
class SessionPool::Impl::Turn {
 public:
  Turn(Impl& pool, Lock& lock, EntryPointer entry) : pool_(pool), entry_(std::move(entry)) {
    entry_->line.push_back(&self_);
    pool_.changed_.wait(lock, [&] {
      return pool_.stopping_ || entry_->closed ||
             (entry_->line.front() == &self_ && !entry_->saving);
    });
    if (!pool_.stopping_ && !entry_->closed) return;
    std::erase(entry_->line, &self_);
    if (!entry_->closed) throw_ended();
    throw Error("session pool: session " + io::quote(entry_->id) + " was closed");
  }
  /// With the lock held, as in the constructor.
  ~Turn() {
    std::erase(entry_->line, &self_);
    pool_.changed_.notify_all();
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  Entry& entry() { return *entry_; }

 private:
  Impl& pool_;
  EntryPointer entry_;
  int self_ = 0;  // its address tells it from others
};

void SessionPool::Impl::end() {
  Lock lock(mutex_);
  stopping_ = true;
  changed_.notify_all();
  lock.unlock();
  scheduler_.stop();
  lock.lock();
  changed_.wait(lock, [&] { return visitors_.empty(); });
}

SessionPool::Impl::EntryPointer SessionPool::Impl::find(const std::string& id) const {
  const auto found = entries_.find(id);
  if (found == entries_.end()) {
    throw Error("session pool: there is no session " + io::quote(id));
  }
  return found->second;
}

// ---- room --------------------------------------------------------------------------------------

/// Loads a session that is on disk.
void SessionPool::Impl::bring(Lock& lock, Entry& entry) {
  if (entry.session) return;
  const fs::path path = folder_ / file_name(entry.id);
  put(lock, entry, entry.bytes, [&] { return Session::load(path, model_); });
  entry.on_disk = false;
  ++loads_;
  std::error_code ignored;  // a file that stays is replaced by the next one
  fs::remove(path, ignored);
}

/// Makes room, and the session in it.
void SessionPool::Impl::put(Lock& lock, Entry& entry, std::int64_t bytes, const MakeSession& make) {
  make_room(lock, bytes);
  std::optional<Session> session;
  std::exception_ptr thrown;
  lock.unlock();
  try {
    session.emplace(make());
  } catch (...) {
    thrown = std::current_exception();
  }
  lock.lock();
  entry.bytes = bytes;
  if (!thrown) {
    entry.session = std::move(session);
    return;
  }
  resident_bytes_ -= bytes;
  --residents_;
  changed_.notify_all();
  std::rethrow_exception(thrown);
}

/// Waits its turn and takes so many bytes.
void SessionPool::Impl::make_room(Lock& lock, std::int64_t bytes) {
  struct Place {
    Impl& pool;
    std::int64_t wanted;
    ~Place() {
      std::erase(pool.wanted_, &wanted);
      pool.changed_.notify_all();
    }
  } place{*this, bytes};
  wanted_.push_back(&place.wanted);
  for (;;) {
    if (stopping_) throw_ended();
    const bool first = wanted_.front() == &place.wanted;
    if (first && (residents_ == 0 || resident_bytes_ + bytes <= options_.memory_bytes)) break;
    if (first && !folder_.exists()) {
      throw Error("session pool: memory_bytes = " + std::to_string(options_.memory_bytes) +
                  " are too few: sessions hold " + std::to_string(resident_bytes_) +
                  " bytes, another needs " + std::to_string(bytes) +
                  ", and there is no folder for idle ones");
    }
    const EntryPointer idle = first ? least_recently_used() : nullptr;
    if (idle) {
      spill(lock, idle);
    } else {
      changed_.wait(lock);
    }
  }
  resident_bytes_ += bytes;
  ++residents_;
}

SessionPool::Impl::EntryPointer SessionPool::Impl::least_recently_used() const {
  EntryPointer oldest;
  for (const auto& [id, entry] : entries_) {
    if (entry->is_idle() && (!oldest || entry->used < oldest->used)) oldest = entry;
  }
  return oldest;
}

/// Saves an idle session and lets it go.
void SessionPool::Impl::spill(Lock& lock, const EntryPointer& entry) {
  entry->saving = true;
  std::exception_ptr thrown;
  lock.unlock();
  try {
    entry->session->save(folder_ / file_name(entry->id));
  } catch (...) {
    thrown = std::current_exception();
  }
  lock.lock();
  entry->saving = false;
  changed_.notify_all();
  if (thrown) std::rethrow_exception(thrown);
  drop(*entry);
  entry->on_disk = true;
  ++saves_;
}

/// Makes room for what the last call has added, and for calls that wait for room. What cannot be
/// saved stays: the next call that needs the room gets the error.
void SessionPool::Impl::shrink(Lock& lock) {
  if (!folder_.exists() || stopping_) return;
  const auto wanted = [&] { return wanted_.empty() ? 0 : *wanted_.front(); };
  try {
    while (resident_bytes_ + wanted() > options_.memory_bytes &&
           (residents_ > 1 || !wanted_.empty())) {
      const EntryPointer idle = least_recently_used();
      if (!idle) return;
      spill(lock, idle);
    }
  } catch (const std::exception&) {
  }
}

/// Forgets a session that is in memory.
void SessionPool::Impl::drop(Entry& entry) {
  entry.session.reset();
  resident_bytes_ -= entry.bytes;
  --residents_;
  changed_.notify_all();
}

// ---- calls -------------------------------------------------------------------------------------

void SessionPool::Impl::admit(const std::string& id, std::int64_t bytes, const MakeSession& make) {
  if (id.empty() || id.size() > kLongestId) {
    throw Error("session pool: an id must have 1 to " + std::to_string(kLongestId) +
                " bytes, got " + std::to_string(id.size()));
  }
  const Visit visit(*this);
  Lock lock(mutex_);
  const auto [place, is_new] = entries_.try_emplace(id, std::make_shared<Entry>(id));
  if (!is_new) throw Error("session pool: there is a session " + io::quote(id) + " already");
  Turn turn(*this, lock, place->second);
  Entry& entry = turn.entry();
  try {
    put(lock, entry, bytes, make);
    entry.used = ++clock_;
  } catch (...) {
    entry.closed = true;
    entries_.erase(id);
    throw;
  }
}

void SessionPool::Impl::close(const std::string& id) {
  const Visit visit(*this);
  Lock lock(mutex_);
  Turn turn(*this, lock, find(id));
  Entry& entry = turn.entry();
  entry.closed = true;
  entries_.erase(id);
  if (entry.session) drop(entry);
  if (!entry.on_disk) return;
  std::error_code ignored;
  fs::remove(folder_ / file_name(id), ignored);
}

template <class Work>
auto SessionPool::Impl::with(const std::string& id, Work work) {
  const Visit visit(*this);
  Lock lock(mutex_);
  // Whatever happens, what the call has added is counted, and room is made for it when its turn is
  // over: so this comes first.
  struct Shrink {
    Impl& pool;
    Lock& lock;
    ~Shrink() { pool.shrink(lock); }
  } const shrink{*this, lock};
  Turn turn(*this, lock, find(id));
  Entry& entry = turn.entry();
  bring(lock, entry);
  struct Settle {
    Impl& pool;
    Lock& lock;
    Entry& entry;
    ~Settle() {
      const std::int64_t bytes = detail::SessionSteps::bytes(*entry.session);
      lock.lock();
      pool.resident_bytes_ += bytes - entry.bytes;
      entry.bytes = bytes;
      entry.used = ++pool.clock_;
    }
  };
  lock.unlock();
  const Settle settle{*this, lock, entry};
  return work(*entry.session);
}

bool SessionPool::Impl::contains(const std::string& id) const {
  const Lock lock(mutex_);
  return entries_.contains(id);
}

std::vector<std::string> SessionPool::Impl::ids() const {
  const Lock lock(mutex_);
  std::vector<std::string> out;
  for (const auto& [id, entry] : entries_) out.push_back(id);
  return out;
}

SessionPoolReport SessionPool::Impl::report() const {
  const auto counts = scheduler_.counts();
  const Lock lock(mutex_);
  const auto on_disk =
      std::ranges::count_if(entries_, [](const auto& each) { return each.second->on_disk; });
  return {.resident = residents_,
          .on_disk = on_disk,
          .resident_bytes = resident_bytes_,
          .batches = counts.batches,
          .tokens_written = counts.tokens,
          .pieces_read = counts.pieces,
          .saves = saves_,
          .loads = loads_};
}

// ---- the pool ----------------------------------------------------------------------------------

SessionPool::SessionPool(Model model, const SessionPoolOptions& options)
    : impl_(std::make_unique<Impl>(std::move(model), options)) {}

SessionPool::~SessionPool() { impl_->end(); }

void SessionPool::create(const std::string& id, std::optional<std::uint64_t> seed) {
  SessionOptions options = this->options().session;
  options.seed = seed.value_or(options.seed);
  impl_->admit(id, impl_->fresh_bytes(), [&] { return Session(model(), options); });
}

void SessionPool::add(const std::string& id, Session session) {
  if (session.model() != model()) {
    throw Error("session pool: session " + io::quote(id) + " must run on the pool's model");
  }
  impl_->admit(id, detail::SessionSteps::bytes(session), [&] { return std::move(session); });
}

void SessionPool::load(const std::string& id, const fs::path& path) {
  add(id, Session::load(path, model()));
}

void SessionPool::close(const std::string& id) { impl_->close(id); }

bool SessionPool::contains(const std::string& id) const { return impl_->contains(id); }

std::vector<std::string> SessionPool::ids() const { return impl_->ids(); }

void SessionPool::read(const std::string& id, std::string_view text, const Progress& progress) {
  impl_->with(id, [&](Session& session) { impl_->scheduler().read(session, text, progress); });
}

std::string SessionPool::write(const std::string& id, const WriteOptions& options) {
  return impl_->with(id,
                     [&](Session& session) { return impl_->scheduler().write(session, options); });
}

void SessionPool::save(const std::string& id, const fs::path& path) {
  run(id, [&](Session& session) { session.save(path); });
}

void SessionPool::run(const std::string& id, const std::function<void(Session&)>& work) {
  impl_->with(id, [&](Session& session) {
    const Session before = session;
    try {
      work(session);
    } catch (...) {
      if (session.model() != model()) session = before;
      throw;
    }
    if (session.model() == model()) return;
    session = before;
    throw Error("session pool: session " + io::quote(id) +
                " must stay on the pool's model; it is as it was");
  });
}

SessionPoolReport SessionPool::report() const { return impl_->report(); }

const Model& SessionPool::model() const { return impl_->model(); }

const SessionPoolOptions& SessionPool::options() const { return impl_->options(); }

}  // namespace fastweights
