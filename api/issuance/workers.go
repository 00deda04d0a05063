package issuance

import (
	"context"
	"sync"
)

// workers run the requests of calls that bring several; a single one stays on its call's goroutine, which grpc keeps
// warm in the same way (NumStreamWorkers). Each is a goroutine that lives as long as the server, and so has the stack that
// a signature needs: growing one anew for every request costs a twentieth of issuance. Most of them wait for the
// ledger at a time, so there are many more than cores.
type workers struct {
	jobs chan func()
	done sync.WaitGroup
}

// workerCount also bounds the requests that share a group of the ledger.
const workerCount = 256

func startWorkers() *workers {
	w := &workers{jobs: make(chan func())}
	for range workerCount {
		w.done.Go(func() {
			for job := range w.jobs {
				job()
			}
		})
	}
	return w
}

// do runs n jobs and returns when all have ended, or as soon as ctx has and no worker was free for the next one. It
// reports how many were begun.
func (w *workers) do(ctx context.Context, n int, job func(i int)) (begun int) {
	var running sync.WaitGroup
	defer running.Wait()
	for i := range n {
		running.Add(1)
		select {
		case w.jobs <- func() { defer running.Done(); job(i) }:
		case <-ctx.Done():
			running.Done()
			return i
		}
	}
	return n
}

// stop ends the workers; nobody may call do any more.
func (w *workers) stop() {
	close(w.jobs)
	w.done.Wait()
}
