// What does not wait for what: a device that hangs stops those who need it, and nobody else.
// Not how fast anything is.
#include "tests/engine_fixture.h"

namespace varve::simulation {
namespace {

TEST_F(EngineTest, AFlushOfFirstWritesDoesNotPassHome) {
    Ok(pool().CreateDisk("d", kMiB));
    EXPECT_EQ(0, Write("d", 0, 4096, 'a'));
    EXPECT_EQ(0, Flush("d"));
    EXPECT_EQ(0, Write("d", 4096, 4096, 'b'));
    machine->home().Stall(true);
    EXPECT_EQ(0, Flush("d"));
    machine->home().Stall(false);
}

}  // namespace
}  // namespace varve::simulation
