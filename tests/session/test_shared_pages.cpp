#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

#include "fastweights/session/shared_pages.hpp"
#include "fastweights/session/token_pages.hpp"

using fastweights::SharedPages;
using fastweights::TokenPages;

namespace {

SharedPages<int> counted(int size) {
  SharedPages<int> pages(4);
  for (int i = 0; i < size; ++i) pages.push_back(i);
  return pages;
}

}  // namespace

TEST_CASE("copies share every page but those that they write into", "[shared_pages]") {
  const auto pages = counted(10);
  std::vector<SharedPages<int>> copies(1000, pages);
  for (auto& copy : copies) copy.push_back(10);
  for (const auto& copy : copies) {
    CHECK(copy.page(0) == pages.page(0));
    CHECK(copy.page(1) == pages.page(1));
    CHECK(copy.page(2) != pages.page(2));
    CHECK(copy.size() == 11);
    CHECK(copy[9] == 9);
    CHECK(copy[10] == 10);
  }
  CHECK(pages.size() == 10);
}

TEST_CASE("pages are dropped from the front and cut at the end", "[shared_pages]") {
  auto pages = counted(10);
  const auto copy = pages;
  pages.drop_before(1);
  CHECK(pages.first_page() == 1);
  CHECK(pages.size() == 10);
  CHECK(pages[4] == 4);
  CHECK(pages.bytes() == 2 * 4 * 4);
  pages.drop_before(0);
  CHECK(pages.first_page() == 1);
  pages.resize(6);
  CHECK(pages.end_page() == 2);
  pages.resize(9);
  CHECK(pages[8] == 0);
  CHECK(pages[5] == 5);
  for (int i = 0; i < 10; ++i) CHECK(copy[i] == i);
}

TEST_CASE("copies are written into on different threads", "[shared_pages]") {
  const auto pages = counted(1000);
  std::vector<SharedPages<int>> copies(4, pages);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&copy = copies[static_cast<std::size_t>(t)], t] {
      for (int i = 0; i < 1000; ++i) copy.edit(i) += t;
    });
  }
  for (auto& thread : threads) thread.join();
  for (int t = 0; t < 4; ++t) {
    for (int i = 0; i < 1000; ++i) CHECK(copies[static_cast<std::size_t>(t)][i] == i + t);
  }
  CHECK(pages[999] == 999);
}

TEST_CASE("tokens come back from as few bytes as their vocabulary needs", "[shared_pages]") {
  for (const auto& [vocabulary, width] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {1, 1}, {256, 1}, {257, 2}, {65536, 2}, {65537, 3}, {std::int64_t{1} << 31, 4}}) {
    TokenPages tokens(vocabulary, 3);
    CHECK(tokens.token_bytes() == width);
    for (std::int64_t i = 0; i < 10; ++i) tokens.push_back((vocabulary - 1) / (i + 1));
    REQUIRE(tokens.size() == 10);
    for (std::int64_t i = 0; i < 10; ++i) CHECK(tokens[i] == (vocabulary - 1) / (i + 1));
    tokens.drop_before(2);
    CHECK(tokens.begin() == 6);
    CHECK(tokens[9] == (vocabulary - 1) / 10);
  }
}
