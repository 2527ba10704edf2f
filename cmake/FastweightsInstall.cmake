# The target `install`, and the package that find_package(fastweights) finds, in the install tree and in
# the build tree.
include(CMakePackageConfigHelpers)

set(folder ${CMAKE_INSTALL_LIBDIR}/cmake/fastweights)
set(targets fastweights_core fastweights_cpu fastweights_io fastweights_state)

# One export set for what needs no LibTorch and one for what does: a user of the first never looks for LibTorch.
install(TARGETS ${targets} EXPORT fastweightsTargets ARCHIVE COMPONENT fastweights)
install(EXPORT fastweightsTargets NAMESPACE fastweights:: DESTINATION ${folder} COMPONENT fastweights)
export(EXPORT fastweightsTargets NAMESPACE fastweights:: FILE "${PROJECT_BINARY_DIR}/fastweightsTargets.cmake")
if(FASTWEIGHTS_LIBTORCH)
  install(TARGETS fastweights EXPORT fastweightsLibTorchTargets ARCHIVE COMPONENT fastweights)
  install(EXPORT fastweightsLibTorchTargets NAMESPACE fastweights:: DESTINATION ${folder} COMPONENT fastweights)
  export(EXPORT fastweightsLibTorchTargets NAMESPACE fastweights::
         FILE "${PROJECT_BINARY_DIR}/fastweightsLibTorchTargets.cmake")
endif()

set(headers FILES_MATCHING PATTERN "*.hpp")
if(NOT FASTWEIGHTS_LIBTORCH)
  # The headers that need LibTorch would only mislead.
  list(APPEND headers PATTERN "ops" EXCLUDE PATTERN "nn" EXCLUDE PATTERN "session/session.hpp" EXCLUDE)
endif()
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/fastweights" "${PROJECT_BINARY_DIR}/include/fastweights"
        DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT fastweights ${headers})

configure_package_config_file(cmake/fastweightsConfig.cmake.in "${PROJECT_BINARY_DIR}/fastweightsConfig.cmake"
                              INSTALL_DESTINATION ${folder})
write_basic_package_version_file("${PROJECT_BINARY_DIR}/fastweightsConfigVersion.cmake"
                                 COMPATIBILITY SameMinorVersion)
configure_file(cmake/FastweightsLibTorch.cmake FastweightsLibTorch.cmake COPYONLY)
install(FILES
  "${PROJECT_BINARY_DIR}/fastweightsConfig.cmake"
  "${PROJECT_BINARY_DIR}/fastweightsConfigVersion.cmake"
  cmake/FastweightsLibTorch.cmake
  DESTINATION ${folder} COMPONENT fastweights)
