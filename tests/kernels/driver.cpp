// Every kernel at every level this machine runs, without Python: the driver that `make sanitize` builds under the
// sanitizers. `kernel_driver` runs all cases; `kernel_driver team` only those that wake the team of threads.
#include <chrono>
#include <cstring>

#include "check.h"
#include "isa.h"
#include "team.h"

int main(int argc, char** argv) {
  const bool team_only = argc == 2 && std::strcmp(argv[1], "team") == 0;
  if (argc > 1 && !team_only) {
    std::fprintf(stderr, "usage: %s [team]\n", argv[0]);
    return 2;
  }
  std::printf("levels:");
  for (gsm::Level level : gsm::supported_levels()) std::printf(" %s", gsm::level_name(level));
  std::printf("\n");

  struct Family {
    const char* name;
    void (*cases)(bool);
  };
  for (const Family& family : {Family{"linear", linear_cases}, Family{"rows", rows_cases}, Family{"sample", sample_cases},
                               Family{"attention", attention_cases}, Family{"fwht", fwht_cases},
                               Family{"planes", planes_cases}, Family{"program", program_cases}}) {
    const long before = check::passed + check::failed;
    const auto start = std::chrono::steady_clock::now();
    family.cases(team_only);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    std::printf("%-10s %8ld checks %6.1f s\n", family.name, check::passed + check::failed - before, took.count());
    std::fflush(stdout);
  }
  // A team of one has no workers: the last ones end here, and the leak check sees what they kept.
  gsm::set_team_threads(1);
  gsm::team_run([](int, int) {});
  std::printf("%ld passed, %ld failed\n", check::passed, check::failed);
  std::fflush(stdout);
  return check::failed == 0 ? 0 : 1;
}
