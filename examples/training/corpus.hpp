#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace training {

/// One text, read as bytes (UTF-8 or not).
struct Work {
  std::string name;  ///< file stem
  std::string bytes;
};

/// Reads files, and every `.txt` below folders, in the order of their names within each folder.
/// Throws `fastweights::FileError` naming a path that is missing, unreadable, empty, or a folder
/// without texts.
std::vector<Work> read_works(const std::vector<std::filesystem::path>& paths);

/// Total size in bytes.
size_t total_bytes(const std::vector<Work>& works);

/// A short digest (FNV-1a, 64 bits, hexadecimal) of names and bytes: a resumed run must see the
/// same texts. It guards against mistakes, not against malice.
std::string digest(const std::vector<Work>& works);

}  // namespace training
