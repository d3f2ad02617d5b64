// Priority of threads: those that commit and answer commands go first when the processors are busy.
// Not realtime: they take little, and share what they take.
#pragma once

namespace varve {

/// Puts the calling thread before the process's others. Needs CAP_SYS_NICE or a raised RLIMIT_NICE;
/// nothing happens without. Threads that it starts afterwards inherit this.
void PreferThisThread();

}  // namespace varve
