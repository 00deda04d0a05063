package kill

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/rotation"
)

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

// drive is a variant's orders with kills on the way.
type drive struct {
	variant
	*site
	*witness
	// now is the fault that the running CA is to die of; its point is empty when there is none left. then is the one after it.
	now, then fault
	killed    int
	// lie is what the CA does wrong; empty: nothing.
	lie string

	next   int        // the order that comes
	spoken chan error // the answer to the order that is under way; nil: none is
	came   time.Time  // since when the next order's step is seen
	lacks  error      // what the end lacks, when all orders were given
	// second and stranger are roots: the one that came first, and one from elsewhere.
	second, stranger string
	imported         []byte // the stranger's certificate
}

const (
	// endsIn is the patience with a Rollout. Nothing in it takes so long; a busy machine does.
	endsIn = 3 * time.Minute
	// startsIn is that with a CA and its agent.
	startsIn = time.Minute
	look     = 40 * time.Millisecond
	// ask is how often the CA is asked how its roots are.
	ask = 120 * time.Millisecond
)

// ready waits until both workloads, their peers, the agent and the CA have their SVIDs.
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
		return d.equipped()
	})
}

// run has everything ordered and led to its end, through all kills: one root is left then, and all have certificates under it.
func (d *drive) run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, endsIn)
	defer cancel()
	if err := d.ready(ctx); err != nil {
		return err
	}
	for point, term := range d.faults() {
		if err := d.arm(ctx, point, term); err != nil {
			return err
		}
	}
	tick := time.NewTicker(look)
	defer tick.Stop()
	var asked time.Time
	for {
		select {
		case <-tick.C:
		case <-d.ca.Done():
			return fmt.Errorf("the CA ended by itself:\n%s", d.ca.Output())
		case <-ctx.Done():
			return fmt.Errorf("it does not end; %d of %d orders were given: %w", d.next, len(d.orders), d.lacks)
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
		if time.Since(asked) < ask {
			continue
		}
		asked = time.Now()
		if over, err := d.lead(ctx); over || err != nil {
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
	d.away(time.Now())
	d.killed++
	r, err := d.inspect(ctx)
	if err != nil {
		return true, err
	}
	if d.spoken != nil {
		err := <-d.spoken
		d.spoken = nil
		if o := d.orders[d.next]; err == nil || o.took != nil && o.took(d, r) {
			d.heard()
		}
	}
	d.now, d.then = d.then, fault{}
	return true, d.start(d.faults())
}

// faults are the failpoints of a process, with their terms.
func (d *drive) faults() map[string]string {
	armed := map[string]string{lingers: d.lingering()}
	if d.now.point != "" {
		armed[d.now.point] = d.now.term()
	}
	if d.lie != "" {
		armed[d.lie] = lying
	}
	return armed
}

// lead says what operators say, and reports whether all is over. An order whose CA died is given again, unless it has taken
// effect.
func (d *drive) lead(ctx context.Context) (bool, error) {
	if d.spoken != nil {
		select {
		case err := <-d.spoken:
			d.spoken = nil
			if err != nil {
				return false, fmt.Errorf("%s: %w", d.orders[d.next].name, err)
			}
			d.heard()
			return false, errors.Join(d.arm(ctx, lingers, d.lingering()), d.arm(ctx, lingersToo, "off"))
		default:
			return false, nil
		}
	}
	a, err := d.authorities(ctx)
	if err != nil {
		return false, nil //nolint:nilerr // it starts, or stands at a failpoint
	}
	d.there(time.Now())
	r := a.GetRollout()
	if d.second == "" {
		d.second = r.GetNewRoot()
	}
	if d.next == len(d.orders) {
		d.lacks = d.over(a)
		return d.lacks == nil && (r == nil || r.GetStep() == string(rotation.StepOut)), nil
	}
	o := d.orders[d.next]
	switch {
	case o.in == "" || o.in == rotation.Step(r.GetStep()) && d.patient(o):
		return false, d.speak(ctx, o)
	case r.GetStep() == string(rotation.StepOut):
		return false, fmt.Errorf("the rollout ended before %s, where to %s: %v", o.in, o.name, r)
	}
	return false, nil
}

// patient gives a canary time to sign, before an operator speaks: each SVID is renewed once in that. Where one is to be
// found that it must not sign for, twice: a moment of issue has whole seconds.
func (d *drive) patient(o order) bool {
	if d.came.IsZero() {
		d.came = time.Now()
	}
	wait := d.ttl / 2
	if d.lie != "" {
		wait = d.ttl
	}
	return o.in != rotation.StepCanary || time.Since(d.came) > wait
}

// lingering is the failpoint's term that keeps the Rollout where the next order is to find it. A canary waits by itself.
func (d *drive) lingering() string { return lingerFor(d.orders, d.next) }

func lingerFor(orders []order, n int) string {
	switch {
	case n == len(orders) || orders[n].in == rotation.StepCanary || n == 0 && orders[n].in == "":
		return "off"
	case orders[n].in == "":
		return `return("any")`
	}
	return fmt.Sprintf("return(%q)", orders[n].in)
}

// heard is called when an order has taken effect.
func (d *drive) heard() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.orders[d.next].then(d)
	d.next++
	d.came = time.Time{}
}

// speak gives an order beside the loop: its CA may stand at a failpoint. The order's effect is to find the Rollout where the
// order behind it is given.
func (d *drive) speak(ctx context.Context, o order) error {
	if err := d.arm(ctx, lingersToo, lingerFor(d.orders, d.next+1)); err != nil {
		return nil //nolint:nilerr // the CA stands at a failpoint, or is gone
	}
	d.mu.Lock()
	o.say(d)
	d.mu.Unlock()
	spoken, conn := make(chan error, 1), d.conn
	d.spoken = spoken
	go func() {
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		spoken <- o.give(ctx, d, conn)
	}()
	return nil
}

// conclude looks at the store of what has ended.
func (d *drive) conclude(ctx context.Context) error {
	d.kill()
	r, err := d.inspect(ctx)
	if err == nil && r.Step != rotation.StepOut {
		err = fmt.Errorf("the journal is at %s", r.Step)
	}
	return err
}

// over: in the end one root signs, the one that was to, and all have certificates under it. No other one is trusted, but one
// that is spared.
func (d *drive) over(a *meshcav1.GetAuthoritiesResponse) error {
	roots := slices.Clone(a.GetRoots())
	if d.ends == besideSecond {
		spared := func(r *meshcav1.RootStatus) bool { return r.GetId() == d.second && r.GetState() == "trusted" }
		if roots = slices.DeleteFunc(roots, spared); len(roots) != len(a.GetRoots())-1 {
			return fmt.Errorf("in the end the roots are %v, want the second one trusted", a.GetRoots())
		}
	}
	if len(roots) != 1 || roots[0].GetState() != "signing" {
		return fmt.Errorf("in the end the roots are %v, want one that signs", a.GetRoots())
	}
	place := third
	switch roots[0].GetId() {
	case d.first:
		if place = first; d.ends == besideSecond {
			place = besideSecond
		}
	case d.second:
		place = second
	}
	if place != d.ends {
		return fmt.Errorf("in the end the root %s signs, the %s to come; want the %s", roots[0].GetId(), place, d.ends)
	}
	return d.renewed(roots[0].GetId())
}

func (e end) String() string { return strings.Fields("first second third first")[e] }
