package main

import (
	"context"
	"fmt"
	"time"

	"github.com/meshca/meshca/test/mesh"
)

// play sends the traffic, shows what happens twice a second, and returns what it came to.
func (s *stage) play(ctx context.Context, o options, d display) (result, error) {
	before, err := s.mesh.Read(ctx)
	if err != nil {
		return result{ttl: o.ttl, cut: true}, err
	}
	traffic := s.mesh.NewTraffic()
	sending, stop := context.WithCancel(ctx)
	defer stop()
	if o.runFor > 0 {
		sending, stop = context.WithTimeout(ctx, o.runFor)
		defer stop()
	}
	begin := time.Now()
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		traffic.Run(sending, o.rate)
	}()

	w := watch{stage: s, traffic: traffic, before: before, last: before, ttl: o.ttl, begin: begin}
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	proxyEnded := s.mesh.Ended()
	for {
		select {
		case <-sent:
			elapsed := time.Since(begin)
			// What the proxies say at the end counts, even if Ctrl-C brought it.
			d.show(w.frame(context.WithoutCancel(ctx), time.Now()))
			return w.result(elapsed), nil
		case <-proxyEnded:
			return w.cut(stop, sent), s.lost("an Envoy")
		case <-s.meshca.Done():
			return w.cut(stop, sent), s.lost("meshca dev")
		case <-tick.C:
			d.show(w.frame(ctx, time.Now()))
		}
	}
}

// cut is the result of a run that lost a part: the traffic so far, which is stopped. Those requests that are under way
// count, as far as they come to an end; a proxy that is gone says so at once.
func (w *watch) cut(stop context.CancelFunc, sent <-chan struct{}) result {
	elapsed := time.Since(w.begin)
	stop()
	<-sent
	r := w.result(elapsed)
	r.cut = true
	return r
}

// lost says that something of the stage ended by itself. What it last printed is worth more than the folder, which is
// kept for it.
func (s *stage) lost(what string) error {
	s.temporary = false
	return fmt.Errorf("%s ended by itself: see the logs in %s\n%s", what, s.dir, s.meshca.Output())
}

// watch makes frames of what the traffic and the proxies say.
type watch struct {
	stage        *stage
	traffic      *mesh.Traffic
	before, last [2]mesh.Reading
	ttl          time.Duration
	begin        time.Time

	// of the last frame, for the rate
	seen   int64
	seenAt time.Time
	rate   float64
}

func (w *watch) frame(ctx context.Context, now time.Time) frame {
	f := frame{running: now.Sub(w.begin), ttl: w.ttl, root: w.stage.root(), hints: w.stage.hints()}
	for i := range w.last {
		r, err := w.stage.mesh.ReadSide(ctx, i)
		if err != nil {
			f.proxies[i].trouble = err.Error()
			r = w.last[i]
		}
		w.last[i] = r
		f.proxies[i].Reading, f.proxies[i].left = r, r.Left(now)
		f.proxies[i].rotations = r.Contexts - w.before[i].Contexts
		f.proxies[i].OK -= w.before[i].OK
		f.proxies[i].Failed -= w.before[i].Failed
	}
	f.ok, f.failed, f.fault = w.traffic.OK(), w.traffic.Failed(), w.traffic.Fault()
	f.rate = w.pace(now, f.ok+f.failed)
	return f
}

// pace is requests a second over the last second or more.
func (w *watch) pace(now time.Time, done int64) float64 {
	if w.seenAt.IsZero() {
		w.seenAt = w.begin
	}
	if d := now.Sub(w.seenAt); d >= time.Second {
		w.rate = float64(done-w.seen) / d.Seconds()
		w.seen, w.seenAt = done, now
	}
	return w.rate
}

// result is what the last frame came to.
func (w *watch) result(elapsed time.Duration) result {
	r := result{
		ok: w.traffic.OK(), failed: w.traffic.Failed(), fault: w.traffic.Fault(), elapsed: elapsed, ttl: w.ttl,
		handshakes: w.last[0].Handshakes - w.before[0].Handshakes,
	}
	for i := range w.last {
		r.rotations[i] = w.last[i].Contexts - w.before[i].Contexts
		r.rejected += w.last[i].Rejected
	}
	return r
}
