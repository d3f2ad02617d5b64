// varve-check: `varve check --pool DIR`, the check of a pool that no server has open. `varve`
// becomes this program; it takes the same arguments.
#include <memory>
#include <string>
#include <vector>

#include "admin/cli.h"
#include "base/standard_streams.h"
#include "cow/pool/pool_directory.h"

namespace {

using varve::Result;
using varve::cow::CheckReport;
using varve::cow::PoolDirectory;

Result<CheckReport> CheckOffline(const std::string& directory) {
    varve::cow::PoolDirectoryOptions options;
    options.path = directory;
    options.create = false;
    options.direct = false;  // the data is not read, so the page cache does no harm
    Result<std::unique_ptr<PoolDirectory>> pool = PoolDirectory::Open(options);
    if (!pool.ok()) return pool.error();
    return varve::cow::CheckMetadata(pool.value()->metadata());
}

}  // namespace

int main(int argc, char** argv) {
    varve::OccupyStandardStreams();
    // Without a program name there are no arguments either.
    return varve::admin::RunCli(std::vector<std::string>(argv + (argc > 0), argv + argc),
                                CheckOffline);
}
