# What the project's own targets have in common.
include_guard(GLOBAL)

# Warnings, sanitizers and position-independent code. PRIVATE: a user's own targets are left alone.
function(fastweights_set_up_target target)
  target_compile_features(${target} PUBLIC cxx_std_20)
  target_compile_options(${target} PRIVATE -Wall -Wextra)
  # Shared objects and programs alike, so that all can use one precompiled header.
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF POSITION_INDEPENDENT_CODE OFF)
  target_compile_options(${target} PRIVATE -fPIC)
  target_compile_definitions(${target} PRIVATE FMT_HEADER_ONLY=1)
  if(FASTWEIGHTS_SANITIZE)
    string(REPLACE ";" "," sanitizers "${FASTWEIGHTS_SANITIZE}")
    target_compile_options(${target} PRIVATE
      -fsanitize=${sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer)
    # PUBLIC: what links a sanitized archive needs the runtime too.
    target_link_options(${target} PUBLIC -fsanitize=${sanitizers})
  endif()
endfunction()

# fastweights_add_library(<name>): the static library <name>, known to users as fastweights::<name less the prefix>.
function(fastweights_add_library target)
  add_library(${target} STATIC)
  fastweights_set_up_target(${target})
  string(REGEX REPLACE "^fastweights_" "" export_name ${target})
  set_target_properties(${target} PROPERTIES EXPORT_NAME ${export_name})
  add_library(fastweights::${export_name} ALIAS ${target})
endfunction()

# fastweights_use_headers(<target> <header-only library>...): for its own sources alone. A link, even a
# private one, would make every user of a static library look that library up.
function(fastweights_use_headers target)
  foreach(library IN LISTS ARGN)
    target_include_directories(${target} SYSTEM PRIVATE
      $<TARGET_PROPERTY:${library},INTERFACE_INCLUDE_DIRECTORIES>)
  endforeach()
endfunction()

# fastweights_add_program(<name> [LIBTORCH] SOURCES ... LIBRARIES ...): LIBTORCH shares the precompiled
# <torch/torch.h> of the target fastweights.
function(fastweights_add_program target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "LIBTORCH" "" "SOURCES;LIBRARIES")
  add_executable(${target} ${arg_SOURCES})
  fastweights_set_up_target(${target})
  target_link_libraries(${target} PRIVATE ${arg_LIBRARIES})
  if(arg_LIBTORCH)
    target_precompile_headers(${target} REUSE_FROM fastweights)
  endif()
endfunction()

# fastweights_add_test(<name> [LIBTORCH] SOURCES ... LIBRARIES ...): a Catch2 program whose cases ctest
# lists one by one; its name is the label.
function(fastweights_add_test target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "LIBTORCH" "" "SOURCES;LIBRARIES")
  set(libtorch "")
  if(arg_LIBTORCH)
    set(libtorch LIBTORCH)
  endif()
  fastweights_add_program(${target} ${libtorch}
    SOURCES ${arg_SOURCES} LIBRARIES ${arg_LIBRARIES} Catch2::Catch2WithMain)
  add_dependencies(tests ${target})
  # Listed when ctest runs, so that a build does not start every program.
  catch_discover_tests(${target} TEST_PREFIX "${target}: " DISCOVERY_MODE PRE_TEST
                       PROPERTIES LABELS ${target} TIMEOUT 600)
endfunction()

# fastweights_add_python_test(<name> <script> LABEL <label> PROGRAM <VARIABLE>=<target>): a script that
# tests a program, whose path it finds in the environment. Exit code 77: skipped, for want of a package.
function(fastweights_add_python_test name script)
  cmake_parse_arguments(PARSE_ARGV 2 arg "" "LABEL;PROGRAM" "")
  if(NOT FASTWEIGHTS_PYTHON_FOR_TESTS)
    message(STATUS "fastweights: there is no Python, so ${name} is left out")
    return()
  endif()
  string(REPLACE "=" ";" program "${arg_PROGRAM}")
  list(GET program 0 variable)
  list(GET program 1 target)
  add_dependencies(tests ${target})
  add_test(NAME ${name} COMMAND "${FASTWEIGHTS_PYTHON_FOR_TESTS}" "${CMAKE_CURRENT_SOURCE_DIR}/${script}")
  set_tests_properties(${name} PROPERTIES
    ENVIRONMENT "${variable}=$<TARGET_FILE:${target}>" LABELS ${arg_LABEL} SKIP_RETURN_CODE 77 TIMEOUT 600)
endfunction()
