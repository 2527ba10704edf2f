// Reads a book with a session, writes on, and keeps the session in a file:
//
//   read_book MODEL BOOK [--state FILE] [--write BYTES]
//
// With --state the session is taken up from FILE, if it is there, and saved to it at the end: a
// second book continues where the first ended.

#include <CLI/CLI.hpp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <memory>
#include <string>

#include "fastweights/io/mapped_file.hpp"
#include "fastweights/nn/model_folder.hpp"
#include "fastweights/session/session.hpp"

namespace {

namespace fs = std::filesystem;
using Model = std::shared_ptr<const fastweights::nn::LanguageModelImpl>;

struct Options {
  fs::path model;
  fs::path book;
  fs::path state;
  std::int64_t write = 400;
};

fastweights::Session open_session(const Options& options, const Model& model) {
  if (options.state.empty() || !fs::exists(options.state)) return fastweights::Session(model);
  return fastweights::Session::load(options.state, model);
}

bool show_progress(std::int64_t done, std::int64_t total) {
  std::fprintf(stderr, "\rread %lld of %lld bytes", static_cast<long long>(done),
               static_cast<long long>(total));
  return true;
}

bool print_token(std::string_view bytes) {
  std::fwrite(bytes.data(), 1, bytes.size(), stdout);
  std::fflush(stdout);
  return true;
}

void run(const Options& options) {
  const fastweights::io::MappedFile book(options.book);
  auto session = open_session(options, fastweights::load_model(options.model));
  double bits = 0.0;
  for (const float each : session.read_and_score(book.text(), show_progress)) bits += each;
  std::fprintf(stderr, "\n%.3f bits per byte; the session holds %lld bytes of text\n",
               bits / static_cast<double>(book.bytes().size()),
               static_cast<long long>(session.position()));
  session.write({.max_tokens = options.write, .temperature = 0.8, .on_token = print_token});
  std::puts("");
  if (!options.state.empty()) session.save(options.state);
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("Reads a book with a session that learns while it reads, and writes on.");
  app.add_option("model", options.model, "folder of the model")->required();
  app.add_option("book", options.book, "text file, of any bytes")->required();
  app.add_option("--state", options.state, "file that keeps the session");
  app.add_option("--write", options.write, "bytes to write on")->check(CLI::NonNegativeNumber);
  CLI11_PARSE(app, argc, argv);
  try {
    run(options);
    return EXIT_SUCCESS;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "read_book: %s\n", error.what());
    return EXIT_FAILURE;
  }
}
