# The libraries that fastweights needs besides LibTorch. Each is a package of the distribution; what is
# missing is named together with the line that installs it.
include_guard(GLOBAL)

# fastweights_find_package(<package> <apt package> [arguments of find_package])
macro(fastweights_find_package package apt)
  find_package(${package} ${ARGN} QUIET)
  if(NOT ${package}_FOUND)
    message(FATAL_ERROR "fastweights: ${package} was not found. Run:\n  sudo apt-get install -y ${apt}\n"
                        "or point -D${package}_DIR= at the folder of its CMake package.")
  endif()
endmacro()

# A package without a CMake file of its own: one header.
function(fastweights_find_header target header apt)
  if(TARGET ${target})
    return()
  endif()
  string(MAKE_C_IDENTIFIER "FASTWEIGHTS_${header}_FOLDER" folder)
  string(TOUPPER "${folder}" folder)
  find_path(${folder} ${header} DOC "The folder that holds ${header}")
  mark_as_advanced(${folder})
  if(NOT ${folder})
    message(FATAL_ERROR "fastweights: ${header} was not found. Run:\n  sudo apt-get install -y ${apt}\n"
                        "or name its folder with -D${folder}=.")
  endif()
  add_library(${target} INTERFACE IMPORTED GLOBAL)
  target_include_directories(${target} SYSTEM INTERFACE "${${folder}}")
endfunction()

# Catch2 3: from the distribution (Debian 12 has it in bookworm-backports), else from its own repository.
macro(fastweights_find_catch2)
  find_package(Catch2 3 QUIET)
  if(NOT Catch2_FOUND)
    message(STATUS "fastweights: Catch2 3 is not installed (libcatch2-dev; on Debian 12 in bookworm-backports): fetching it")
    include(FetchContent)
    FetchContent_Declare(Catch2
      GIT_REPOSITORY https://github.com/catchorg/Catch2.git
      GIT_TAG v3.7.1
      GIT_SHALLOW ON)
    FetchContent_MakeAvailable(Catch2)
    list(APPEND CMAKE_MODULE_PATH "${catch2_SOURCE_DIR}/extras")
  endif()
  include(Catch)
endmacro()
