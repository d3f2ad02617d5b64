// The descriptors 0 to 2, where a program was started without them.
// Not their use.
#pragma once

namespace varve {

/// Occupies those of the three that are closed, so that no file or socket opened later gets the
/// number and is read as stdin or written to as stdout or stderr. Reads and writes still fail.
/// First thing in main().
void OccupyStandardStreams();

}  // namespace varve
