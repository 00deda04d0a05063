package issuance

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/meshca/meshca/api/refusal"
)

func TestWorkersStopWaitingWithTheirCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startWorkers()
		ctx, cancel := context.WithCancel(t.Context())
		hang := make(chan struct{})
		var ran atomic.Int64
		begun := make(chan int)
		go func() { begun <- w.do(ctx, workerCount+5, func(int) { ran.Add(1); <-hang }) }()
		synctest.Wait()
		if ran.Load() != workerCount {
			t.Errorf("%d jobs run at a time, want %d", ran.Load(), workerCount)
		}
		cancel()
		synctest.Wait()
		close(hang)
		if n := <-begun; n != workerCount {
			t.Errorf("%d jobs were begun, want %d: the rest had no worker before the call ended", n, workerCount)
		}
		w.stop()
	})
}

func TestARequestOfAnEndedCallHasAName(t *testing.T) {
	for _, err := range []error{context.Canceled, context.DeadlineExceeded} {
		if r := refused(err).GetRefusal(); r.GetReason() != string(refusal.CallEnded) || r.GetRetryAfter() == nil {
			t.Errorf("%v: %v", err, r)
		}
	}
}
