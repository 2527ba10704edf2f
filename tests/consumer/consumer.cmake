# cmake -D SOURCE=<project> -D BUILD=<folder> -D PROGRAM=<name> [-D "RUN=arguments"] -D "ARGUMENTS=-DX=Y|..." -P:
# configures a consumer project from nothing, builds it, and runs its program. Without a PROGRAM it only
# configures.
function(run)
  execute_process(COMMAND ${ARGV} RESULT_VARIABLE result)
  if(result)
    list(JOIN ARGV " " line)
    message(FATAL_ERROR "failed: ${line}")
  endif()
endfunction()

string(REPLACE "|" ";" arguments "${ARGUMENTS}")
file(REMOVE_RECURSE "${BUILD}")
run("${CMAKE_COMMAND}" -S "${SOURCE}" -B "${BUILD}" ${arguments})
if(PROGRAM)
  run("${CMAKE_COMMAND}" --build "${BUILD}" --target ${PROGRAM})
  run("${BUILD}/${PROGRAM}" ${RUN})
endif()
