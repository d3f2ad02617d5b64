// Requester: whoever asked for work on a volume, and may go away before it is done.
// Not a connection: it says only whether somebody still waits.
//
// Belongs to the executor of the volume that works for it.
#pragma once

#include "base/check.h"
#include "base/sync.h"

namespace varve::cow {

/// A client, or whoever works for one. It must outlive all work that was started with it.
class Requester {
  public:
    /// Nobody waits any more: what it asked for is given up between pieces and answered ECANCELED.
    bool gone() const { return gone_; }

    /// It goes. What waits for its sake is posted to its executor and ends soon; what is under way
    /// at the device is finished. Once all its tasks have ended nothing of it happens any more.
    void Leave() {
        gone_ = true;
        for (Waiting* waiting = first_; waiting;) {
            Waiting* following = waiting->after_;
            waiting->left_(waiting);
            waiting = following;
        }
    }

    Requester() = default;
    Requester(const Requester&) = delete;
    ~Requester() { VARVE_CHECK(first_ == nullptr); }

    /// Something that waits for its sake, as long as the object exists; nobody's if it is null.
    class Waiting {
      public:
        /// `left` is called from Leave(). It may not destroy this or any other.
        Waiting(Requester* requester, void (*left)(Waiting*)) : requester_(requester), left_(left) {
            if (!requester_) return;
            after_ = requester_->first_;
            if (after_) after_->before_ = this;
            requester_->first_ = this;
        }
        Waiting(const Waiting&) = delete;
        ~Waiting() {
            if (!requester_) return;
            (before_ ? before_->after_ : requester_->first_) = after_;
            if (after_) after_->before_ = before_;
        }

      private:
        friend class Requester;
        Requester* const requester_;
        void (*const left_)(Waiting*);
        Waiting* before_ = nullptr;
        Waiting* after_ = nullptr;
    };

  private:
    bool gone_ = false;
    Waiting* first_ = nullptr;
};

/// Waits on a list, as list.Wait() does, but not after its requester, if it has one, has left: then
/// all who wait on the list look again.
class WaitFor : private Requester::Waiting {
  public:
    WaitFor(WaitList& list, Requester* requester)
        : Waiting(requester, &WaitFor::Left), list_(list), waiter_(list) {}
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> handle) { waiter_.await_suspend(handle); }
    void await_resume() const noexcept {}

  private:
    static void Left(Requester::Waiting* waiting) {
        static_cast<WaitFor*>(waiting)->list_.WakeAll();
    }

    WaitList& list_;
    WaitList::Waiter waiter_;
};

}  // namespace varve::cow
