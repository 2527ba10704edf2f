// The smallest program that runs a session: reads a line again and again, and is less surprised
// each time.

#include <cstdio>
#include <exception>

#include "fastweights/nn/model_folder.hpp"
#include "fastweights/session/session.hpp"

int main(int argc, char** argv) try {
  if (argc != 2) {
    std::fputs("usage: link_me MODEL\n", stderr);
    return 2;
  }
  fastweights::Session session(fastweights::load_model(argv[1]));
  const char* line = "My good lord Fastweights, remember what thou readest.\n";
  for (int time = 1; time <= 3; ++time) {
    std::printf("time %d: %.2f bits per byte\n", time, session.score(line));
    session.read(line);
  }
  std::printf("and on: %s\n", session.write({.max_tokens = 80, .temperature = 0.5}).c_str());
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "link_me: %s\n", error.what());
  return 1;
}
