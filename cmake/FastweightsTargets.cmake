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
