package kill

import (
	"context"
	"encoding/pem"
	"fmt"
	"path/filepath"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshca/meshca/api/admin/client"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/upstream/disk"
	"github.com/meshca/meshca/rotation"
)

// order is what an operator says.
type order struct {
	name string
	// in is the step in which it is said; the Rollout lingers there. Empty: at once.
	in rotation.Step
	// say tells the witness, a moment before.
	say  func(*drive)
	give func(context.Context, *drive, *client.Conn) error
	// took reports whether it has taken effect, where the CA died over it; nil: it has to be said again.
	took func(*drive, rotation.Rollout) bool
	// then tells the witness that it has taken effect.
	then func(*drive)
}

func rotate(share int) order {
	return order{
		name: "rotate root",
		say:  func(d *drive) { d.said.share = share },
		give: func(ctx context.Context, _ *drive, c *client.Conn) error {
			_, err := c.Authorities.RotateRoot(ctx, &meshcav1.RotateRootRequest{Share: uint32(share)})
			return err
		},
		took: func(_ *drive, r rotation.Rollout) bool { return r.Old.ID != "" },
		then: func(*drive) {},
	}
}

// goOn ends a canary.
func goOn() order {
	return order{
		name: "continue", in: rotation.StepCanary,
		say: func(d *drive) { d.said.freed() },
		give: func(ctx context.Context, _ *drive, c *client.Conn) error {
			_, err := c.Authorities.ContinueRollout(ctx, &meshcav1.ContinueRolloutRequest{})
			return err
		},
		took: func(_ *drive, r rotation.Rollout) bool { return r.NewShare == 100 },
		then: func(*drive) {},
	}
}

// turnForward ends an abort, while the root that it goes back to does not sign yet.
func turnForward() order {
	o := goOn()
	o.in, o.took = rotation.StepConfirmed, func(_ *drive, r rotation.Rollout) bool { return !r.Aborted }
	return o
}

// rotateAgain begins a Rollout to the second root when one to it is over that was aborted.
func rotateAgain() order {
	return order{
		name: "rotate root to the second one", in: rotation.StepOut,
		say: func(d *drive) { delete(d.said.barred, d.second) },
		give: func(ctx context.Context, d *drive, c *client.Conn) error {
			_, err := c.Authorities.RotateRoot(ctx, &meshcav1.RotateRootRequest{Issuer: d.second})
			return err
		},
		took: func(_ *drive, r rotation.Rollout) bool { return !r.Aborted },
		then: func(*drive) {},
	}
}

func abort(in rotation.Step) order {
	return order{
		name: "abort", in: in,
		say: func(*drive) {},
		give: func(ctx context.Context, _ *drive, c *client.Conn) error {
			_, err := c.Authorities.AbortRollout(ctx, &meshcav1.AbortRolloutRequest{})
			return err
		},
		took: func(_ *drive, r rotation.Rollout) bool { return r.Aborted },
		then: func(d *drive) { d.giveUp(in) },
	}
}

// What can be tainted.
func theFirst(d *drive) string    { return d.first }
func theSecond(d *drive) string   { return d.second }
func theStranger(d *drive) string { return d.stranger }

func taint(in rotation.Step, what func(*drive) string) order {
	return order{
		name: "taint root", in: in,
		say: func(d *drive) {
			if _, before := d.said.tainted[what(d)]; !before {
				d.said.tainted[what(d)] = time.Now().Add(within / 2)
			}
			d.said.freed() // an emergency has no canary
			if _, tainted := d.said.tainted[d.second]; !tainted {
				delete(d.said.barred, d.second) // what was aborted may come again
			}
		},
		give: func(ctx context.Context, d *drive, c *client.Conn) error {
			_, err := c.Authorities.RotateRoot(ctx, &meshcav1.RotateRootRequest{TaintedRoot: what(d), TaintedWithin: durationpb.New(within)})
			return err
		},
		took: func(d *drive, r rotation.Rollout) bool { _, tainted := r.Tainted(what(d)); return tainted },
		then: func(d *drive) {
			if what(d) == d.second {
				d.giveUp(in)
			}
		},
	}
}

// giveUp notes that the second root signs for nobody for good, if it had not come to sign in this step.
func (d *drive) giveUp(in rotation.Step) {
	if in == rotation.StepChosen || in == rotation.StepPublished || in == rotation.StepConfirmed {
		d.said.barred[d.second] = true
	}
}

// freed notes that a root that comes may sign for all.
func (s *words) freed() {
	if s.free.IsZero() {
		s.free = time.Now()
	}
}

// trust takes in a root that signs for nobody here.
func trust() order {
	return order{
		name: "root import",
		say:  func(*drive) {},
		give: func(ctx context.Context, d *drive, c *client.Conn) error {
			files := disk.Files{Cert: filepath.Join(d.site.dir, "stranger.crt"), Key: filepath.Join(d.site.dir, "stranger.key")}
			if d.imported == nil {
				made, err := disk.Create(files, disk.CreateOptions{TrustDomain: domain, CommonName: "stranger"})
				if err != nil {
					return err
				}
				d.imported = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: made.Raw})
				d.stranger = ca.RootID(made)
			}
			_, err := c.Authorities.TrustRoot(ctx, &meshcav1.TrustRootRequest{Pem: d.imported})
			return err
		},
		then: func(*drive) {},
	}
}

// trustSecond takes in the second root for its own sake.
func trustSecond(in rotation.Step) order {
	return order{
		name: "root import of the second one", in: in,
		say: func(*drive) {},
		give: func(ctx context.Context, d *drive, c *client.Conn) error {
			text, err := d.pem(d.second)
			if err == nil {
				_, err = c.Authorities.TrustRoot(ctx, &meshcav1.TrustRootRequest{Pem: text})
			}
			return err
		},
		took: func(_ *drive, r rotation.Rollout) bool { return r.Trusted },
		then: func(*drive) {},
	}
}

// replaceIntermediates replaces them; with a time their keys are stolen, and what they signed is renewed, spread over it.
func replaceIntermediates(in rotation.Step, stolen time.Duration) order {
	ask := &meshcav1.RotateIntermediateRequest{}
	if stolen > 0 {
		ask.TaintedWithin = durationpb.New(stolen)
	}
	return order{
		name: "rotate intermediate", in: in,
		say: func(d *drive) {
			for _, l := range d.issued {
				d.said.replaced[l.authority] = true
			}
		},
		give: func(ctx context.Context, d *drive, c *client.Conn) error {
			answer, err := c.Authorities.RotateIntermediate(ctx, ask)
			if err == nil && len(answer.GetNewSerials()) == 0 {
				err = fmt.Errorf("no intermediate is new")
			}
			return err
		},
		then: func(d *drive) { d.said.done = time.Now() },
	}
}
