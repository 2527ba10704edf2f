# Decides FASTWEIGHTS_WITH_CUDA from FASTWEIGHTS_CUDA.
#
# ON links the CUDA half of LibTorch, so that programs can put tensors on a GPU. It needs no CUDA toolkit.
# AUTO does so where a CUDA compiler is installed: a machine that is made for it. Loading that half costs
# every program about a second.
if(NOT FASTWEIGHTS_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "fastweights: FASTWEIGHTS_CUDA must be AUTO, ON or OFF, got '${FASTWEIGHTS_CUDA}'")
endif()
set(FASTWEIGHTS_WITH_CUDA ${FASTWEIGHTS_CUDA})
if(FASTWEIGHTS_CUDA STREQUAL "AUTO")
  include(CheckLanguage)
  check_language(CUDA)
  set(FASTWEIGHTS_WITH_CUDA OFF)
  if(CMAKE_CUDA_COMPILER)
    set(FASTWEIGHTS_WITH_CUDA ON)
  endif()
endif()
