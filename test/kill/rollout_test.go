package kill

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/rotation"
)

// kind is a way for a Rollout to go.
type kind struct {
	name string
	settings
	order *meshcav1.RotateRootRequest
	// at is the step in which an operator speaks; empty: none.
	at rotation.Step
	// abort is what he says then; else he says to go on.
	abort bool
}

// within is an emergency's bound, the shortest there is.
const within = 20 * time.Second

var kinds = []kind{
	{name: "plain", settings: settings{ttl: 5 * time.Second}, order: &meshcav1.RotateRootRequest{}},
	{name: "canary", settings: settings{ttl: 5 * time.Second}, order: &meshcav1.RotateRootRequest{Share: share}, at: rotation.StepCanary},
	{name: "abort", settings: settings{ttl: 5 * time.Second}, order: &meshcav1.RotateRootRequest{Share: share}, at: rotation.StepCanary, abort: true},
	{name: "early abort", settings: settings{ttl: 5 * time.Second, published: 4 * time.Second}, order: &meshcav1.RotateRootRequest{}, at: rotation.StepPublished, abort: true},
	// SVIDs that live longer than the bound: the old root is forced out.
	{name: "taint", settings: settings{ttl: time.Minute}, order: &meshcav1.RotateRootRequest{TaintedWithin: durationpb.New(within)}},
}

// fault is a kill: at the failpoint, when it is passed for the nth time.
type fault struct {
	point string
	nth   int
}

func (f fault) term() string {
	const stand = "sleep(3600000)" // until the kill
	if f.nth == 1 {
		return stand
	}
	return fmt.Sprintf("%d*off->%s", f.nth-1, stand)
}

// drive is a Rollout of a kind with kills on its way.
type drive struct {
	kind
	*site
	*witness
	// now is the fault that the running CA is to die of; its point is empty when there is none left. then is the one after it.
	now, then fault
	killed    int
	spoken    chan error // the answer to an order that is under way; nil: none is
	begun     bool
	signed    time.Time // since when the canary is seen; its share is given time to be signed for
}

const (
	// endsIn is the patience with a Rollout. Nothing in it takes so long; a busy machine does.
	endsIn = 3 * time.Minute
	// startsIn is that with a CA and its agent.
	startsIn = time.Minute
	look     = 20 * time.Millisecond
)

// ready waits until both workloads, the agent and the CA have their SVIDs.
func (d *drive) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startsIn)
	defer cancel()
	return d.ca.Await(ctx, func(ctx context.Context) error {
		a, err := d.authorities(ctx)
		if err != nil {
			return err
		}
		if len(a.GetRoots()) != 1 || a.GetRoots()[0].GetLiveSvids() < uint64(len(accounts)+2) || len(a.GetAgents()) != 1 || !a.GetAgents()[0].GetConnected() {
			return fmt.Errorf("not all have their SVIDs: %v", a)
		}
		return nil
	})
}

// run has the Rollout ordered and led to its end, through all kills.
func (d *drive) run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, endsIn)
	defer cancel()
	if err := d.ready(ctx); err != nil {
		return err
	}
	if d.now.point != "" {
		if err := d.arm(ctx, d.now.point, d.now.term()); err != nil {
			return err
		}
	}
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-d.ca.Done():
			return fmt.Errorf("the CA ended by itself:\n%s", d.ca.Output())
		case <-ctx.Done():
			return errors.New("it does not end")
		}
		if err := d.look(); err != nil {
			return err
		}
		if died, err := d.die(ctx); died || err != nil {
			if err != nil {
				return err
			}
			continue
		}
		over, err := d.lead(ctx)
		if over || err != nil {
			return err
		}
	}
}

// die kills the CA if it stands at its fault, looks at what it left, and starts the next one.
func (d *drive) die(ctx context.Context) (bool, error) {
	if d.now.point == "" {
		return false, nil
	}
	n, err := d.passed(ctx, d.now.point)
	if err != nil || n < d.now.nth {
		return false, nil //nolint:nilerr // a CA that starts does not answer yet
	}
	d.kill()
	d.killed++
	if d.spoken != nil {
		<-d.spoken
		d.spoken = nil
	}
	if _, err := d.inspect(ctx); err != nil {
		return true, err
	}
	d.now, d.then = d.then, fault{}
	armed := map[string]string{}
	if d.now.point != "" {
		armed[d.now.point] = d.now.term()
	}
	return true, d.start(armed)
}

// lead says what an operator says, and reports whether the Rollout is over. An order whose CA died is given again, unless
// it has taken effect.
func (d *drive) lead(ctx context.Context) (bool, error) {
	if d.spoken != nil {
		select {
		case err := <-d.spoken:
			d.spoken = nil
			if err != nil {
				return false, err
			}
		default:
		}
		return false, nil
	}
	a, err := d.authorities(ctx)
	if err != nil {
		return false, nil //nolint:nilerr // it starts, or stands at a failpoint
	}
	r := a.GetRollout()
	d.begun = d.begun || r != nil
	conn := d.conn.Authorities
	switch {
	case r == nil && d.begun:
		return false, errors.New("the rollout is forgotten")
	case r == nil:
		d.speak(ctx, func(ctx context.Context) error { _, err := conn.RotateRoot(ctx, d.order); return err })
	case r.GetStep() == string(d.at) && !r.GetAborted() && d.patient():
		if d.abort {
			d.speak(ctx, func(ctx context.Context) error {
				_, err := conn.AbortRollout(ctx, &meshcav1.AbortRolloutRequest{})
				return err
			})
		} else {
			d.speak(ctx, func(ctx context.Context) error {
				_, err := conn.ContinueRollout(ctx, &meshcav1.ContinueRolloutRequest{})
				return err
			})
		}
	case r.GetStep() == string(rotation.StepOut):
		if r.GetAborted() != d.abort {
			return true, fmt.Errorf("it ended, aborted: %t", r.GetAborted())
		}
		return true, nil
	}
	return false, nil
}

// patient gives a canary time to sign, before an operator speaks.
func (d *drive) patient() bool {
	if d.at != rotation.StepCanary {
		return true
	}
	if d.signed.IsZero() {
		d.signed = time.Now()
	}
	return time.Since(d.signed) > d.ttl/2
}

// speak gives an order beside the loop: its CA may stand at a failpoint.
func (d *drive) speak(ctx context.Context, order func(context.Context) error) {
	answer := make(chan error, 1)
	d.spoken = answer
	ca := d.ca
	go func() {
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		err := order(ctx)
		select {
		case <-ca.Done():
			err = nil // it died over it
		default:
		}
		answer <- err
	}()
}
