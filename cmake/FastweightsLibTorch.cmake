# Looks LibTorch up in an installed `torch` package or in a LibTorch folder, and describes it as the
# imported targets `fastweights::libtorch` and, where the package has it, `fastweights::libtorch_python`.
#
# find_package(Torch) is of no use here: in the CUDA wheel of the package index it stops on a machine
# without a CUDA toolkit. Nothing below needs one.
#
#   FASTWEIGHTS_LIBTORCH_ROOT      a folder with include/ and lib/ (a LibTorch folder, or site-packages/torch)
#   FASTWEIGHTS_PYTHON_EXECUTABLE  the Python whose `torch` is taken when no folder is given
#
# This file is used by the build and by the installed package.
include_guard(GLOBAL)

set(FASTWEIGHTS_LIBTORCH_MINIMUM 2.11)

# Where the `torch` that `python` would import lies; empty when there is none. Nothing is imported:
# `import torch` takes seconds.
function(_fastweights_torch_of_python python result)
  set(${result} "" PARENT_SCOPE)
  execute_process(
    COMMAND "${python}" -c "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed ERROR_QUIET)
  if(NOT failed AND EXISTS "${folder}/lib")
    set(${result} "${folder}" PARENT_SCOPE)
  endif()
endfunction()

# The Python to ask: the one given, else the project's own .venv, else an active environment's, else
# the one on PATH.
function(fastweights_find_python result)
  set(${result} "" PARENT_SCOPE)
  if(FASTWEIGHTS_PYTHON_EXECUTABLE)
    set(${result} "${FASTWEIGHTS_PYTHON_EXECUTABLE}" PARENT_SCOPE)
    return()
  endif()
  if(SKBUILD)  # pip names the Python that it builds a wheel for
    set(${result} "${Python_EXECUTABLE}" PARENT_SCOPE)
    return()
  endif()
  foreach(candidate "${PROJECT_SOURCE_DIR}/.venv/bin/python" "$ENV{VIRTUAL_ENV}/bin/python")
    if(EXISTS "${candidate}")
      set(${result} "${candidate}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  find_program(_fastweights_python NAMES python3 python NO_CACHE)
  if(_fastweights_python)
    set(${result} "${_fastweights_python}" PARENT_SCOPE)
  endif()
endfunction()

# The version of the LibTorch in `root`, from its headers; empty when they are not there.
function(_fastweights_libtorch_version root result)
  set(${result} "" PARENT_SCOPE)
  foreach(header torch/headeronly/version.h torch/csrc/api/include/torch/version.h)
    if(EXISTS "${root}/include/${header}")
      file(STRINGS "${root}/include/${header}" lines REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH)")
      if(lines MATCHES "MAJOR ([0-9]+).*MINOR ([0-9]+).*PATCH ([0-9]+)")
        set(${result} "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}.${CMAKE_MATCH_3}" PARENT_SCOPE)
        return()
      endif()
    endif()
  endforeach()
endfunction()

# Sets <result> to the folder that holds LibTorch's include/ and lib/, and <why> to what is wrong when
# there is none.
function(_fastweights_libtorch_root hint result why)
  set(${result} "" PARENT_SCOPE)
  if(FASTWEIGHTS_LIBTORCH_ROOT)
    if(EXISTS "${FASTWEIGHTS_LIBTORCH_ROOT}/lib/libtorch_cpu.so")
      set(${result} "${FASTWEIGHTS_LIBTORCH_ROOT}" PARENT_SCOPE)
    else()
      set(${why} "FASTWEIGHTS_LIBTORCH_ROOT is ${FASTWEIGHTS_LIBTORCH_ROOT}, which has no lib/libtorch_cpu.so"
          PARENT_SCOPE)
    endif()
    return()
  endif()
  if(NOT FASTWEIGHTS_PYTHON_EXECUTABLE AND hint AND EXISTS "${hint}/lib/libtorch_cpu.so")
    set(${result} "${hint}" PARENT_SCOPE)
    return()
  endif()
  fastweights_find_python(python)
  if(NOT python)
    set(${why} "there is no python3 to ask for an installed torch package" PARENT_SCOPE)
    return()
  endif()
  _fastweights_torch_of_python("${python}" root)
  if(NOT root)
    set(${why} "${python} has no package `torch`" PARENT_SCOPE)
  endif()
  set(${result} "${root}" PARENT_SCOPE)
endfunction()

# The OpenMP runtime that LibTorch's own libraries run on. A second one in the process would mean two
# thread pools, so it is linked by its path. clang's OpenMP code needs LLVM's runtime; that one also
# answers to libgomp's names, and serves both when it is loaded first.
function(_fastweights_openmp_runtime lib result)
  if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    find_library(FASTWEIGHTS_LIBOMP NAMES omp omp5
                 HINTS /usr/lib/llvm-${CMAKE_CXX_COMPILER_VERSION_MAJOR}/lib
                 DOC "LLVM's OpenMP runtime, which code compiled by clang needs")
    mark_as_advanced(FASTWEIGHTS_LIBOMP)
    if(NOT FASTWEIGHTS_LIBOMP)
      message(FATAL_ERROR "fastweights: clang needs its OpenMP runtime. Run:\n  sudo apt-get install -y libomp-dev\n")
    endif()
    set(${result} "${FASTWEIGHTS_LIBOMP}" PARENT_SCOPE)
    return()
  endif()
  # The name in the wheel is libgomp.so.1, or carries a hash (libgomp-24e2ab19.so.1).
  file(GLOB bundled "${lib}/libgomp*.so*")
  if(bundled)
    list(GET bundled 0 bundled)
    set(${result} "${bundled}" PARENT_SCOPE)
  else()
    set(${result} gomp PARENT_SCOPE)
  endif()
endfunction()

# Defines `fastweights::libtorch`. Arguments:
#   CUDA <bool>       also link LibTorch's CUDA half
#   EXACT <version>   accept only this minor version (the one that the library was built with)
#   HINT <folder>     the LibTorch to take when neither a folder nor a Python was given
# Sets FASTWEIGHTS_LIBTORCH_VERSION and FASTWEIGHTS_LIBTORCH_FOLDER, or <error_variable> to the reason
# why LibTorch can't be used.
function(fastweights_find_libtorch error_variable)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "CUDA;EXACT;HINT" "")
  set(${error_variable} "" PARENT_SCOPE)
  if(TARGET fastweights::libtorch)
    return()
  endif()

  set(advice "Install it with\n  python3 -m venv .venv && .venv/bin/pip install 'torch>=${FASTWEIGHTS_LIBTORCH_MINIMUM}'\n"
             "or name the Python that has it with -DFASTWEIGHTS_PYTHON_EXECUTABLE=/path/to/python,\n"
             "or a LibTorch folder with -DFASTWEIGHTS_LIBTORCH_ROOT=/path/to/libtorch.")
  string(CONCAT advice ${advice})
  _fastweights_libtorch_root("${arg_HINT}" root why)
  if(NOT root)
    set(${error_variable} "LibTorch was not found: ${why}.\n${advice}" PARENT_SCOPE)
    return()
  endif()

  _fastweights_libtorch_version("${root}" version)
  if(NOT version OR version VERSION_LESS FASTWEIGHTS_LIBTORCH_MINIMUM)
    set(${error_variable}
        "the LibTorch in ${root} is version '${version}', but ${FASTWEIGHTS_LIBTORCH_MINIMUM} or newer is needed.\n${advice}"
        PARENT_SCOPE)
    return()
  endif()
  if(arg_EXACT)
    string(REGEX MATCH "^[0-9]+\\.[0-9]+" built "${arg_EXACT}")
    string(REGEX MATCH "^[0-9]+\\.[0-9]+" found "${version}")
    if(NOT built STREQUAL found)
      set(${error_variable}
          "fastweights was built with LibTorch ${arg_EXACT}, but ${root} is version ${version}; their ABIs differ.\nName the other with -DFASTWEIGHTS_LIBTORCH_ROOT=/path/to/libtorch, or build fastweights again."
          PARENT_SCOPE)
      return()
    endif()
  endif()

  set(lib "${root}/lib")
  # libstdc++ has two layouts of std::string; a program and LibTorch must have the same one.
  file(STRINGS "${lib}/libc10.so" new_abi REGEX "__cxx11" LIMIT_COUNT 1)
  if(NOT new_abi)
    set(${error_variable}
        "the LibTorch in ${root} was built with _GLIBCXX_USE_CXX11_ABI=0; fastweights needs one with the C++11 ABI, as in the torch packages since 2.7.\n${advice}"
        PARENT_SCOPE)
    return()
  endif()
  if(arg_CUDA AND NOT EXISTS "${lib}/libtorch_cuda.so")
    set(${error_variable}
        "FASTWEIGHTS_CUDA is ON, but the LibTorch in ${root} is a CPU build. Install a CUDA build of torch, or set FASTWEIGHTS_CUDA=OFF."
        PARENT_SCOPE)
    return()
  endif()

  _fastweights_openmp_runtime("${lib}" openmp)
  add_library(fastweights::libtorch INTERFACE IMPORTED GLOBAL)
  target_include_directories(fastweights::libtorch SYSTEM INTERFACE
    "${root}/include" "${root}/include/torch/csrc/api/include")
  # at::parallel_for is a template: a unit compiled without OpenMP runs it on one thread, silently.
  target_compile_options(fastweights::libtorch INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fopenmp>)
  # The wheel's CUDA libraries have unresolved symbols of the driver, of which this machine may have none.
  target_link_options(fastweights::libtorch INTERFACE -Wl,--allow-shlib-undefined)
  # libtorch.so is an empty shell, which would load the CUDA half into every program.
  target_link_libraries(fastweights::libtorch INTERFACE
    "${openmp}" "${lib}/libtorch_cpu.so" "${lib}/libc10.so")
  if(arg_CUDA)
    # Nothing refers to a symbol of the CUDA half; it registers itself when it is loaded.
    target_link_libraries(fastweights::libtorch INTERFACE
      "-Wl,--push-state,--no-as-needed,${lib}/libtorch_cuda.so,${lib}/libc10_cuda.so,--pop-state")
  endif()
  if(EXISTS "${lib}/libtorch_python.so")
    add_library(fastweights::libtorch_python INTERFACE IMPORTED GLOBAL)
    target_link_libraries(fastweights::libtorch_python INTERFACE
      fastweights::libtorch "${lib}/libtorch_python.so")
  endif()
  set(FASTWEIGHTS_LIBTORCH_VERSION "${version}" PARENT_SCOPE)
  set(FASTWEIGHTS_LIBTORCH_FOLDER "${root}" PARENT_SCOPE)
endfunction()
