# Uses ccache where it is installed, unless a launcher was given.
find_program(FASTWEIGHTS_CCACHE ccache DOC "The compiler cache; empty: none")
mark_as_advanced(FASTWEIGHTS_CCACHE)
if(FASTWEIGHTS_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  # With a precompiled header ccache refuses to cache unless it is told that macros in it are no concern.
  set(CMAKE_CXX_COMPILER_LAUNCHER
    env CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime ${FASTWEIGHTS_CCACHE})
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    add_compile_options(-fpch-preprocess)
  endif()
endif()
