// varve: the command line for a running varved.
// Only the entry: everything else is in cli.h, where tests reach it.
#include <string>
#include <vector>

#include "admin/cli.h"

int main(int argc, char** argv) {
    const auto check_offline =
        [](const std::string& directory) -> varve::Result<varve::cow::CheckReport> {
        return varve::MakeError(varve::ErrorKind::kFailed,
                                "cannot check '" + directory + "' offline yet");
    };
    return varve::admin::RunCli(std::vector<std::string>(argv + 1, argv + argc), check_offline);
}
