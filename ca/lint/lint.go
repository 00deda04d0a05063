package lint

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
)

// Options bounds a Linter; the zero value is usual.
type Options struct {
	// MaxShapes is how many shapes are remembered, 1024 by default. Beyond that all are forgotten and linted again.
	MaxShapes int
}

// Linter lints templates; it is the ca.Issuer's Linter. It is safe for concurrent use.
type Linter struct {
	rules []Rule
	full  *fullSet

	mu     sync.Mutex
	max    int
	shapes map[shape]*verdict
}

// verdict is what the full set said of a shape; done closes when it is there.
type verdict struct {
	done chan struct{}
	err  error
}

// errUnfinished is what those who wait see of a run that panicked: a shape is never signed unlinted.
var errUnfinished = errors.New("the lints did not come to an end")

// New returns a Linter.
func New(o Options) (*Linter, error) {
	if o.MaxShapes <= 0 {
		o.MaxShapes = 1024
	}
	full, err := newFullSet()
	if err != nil {
		return nil, err
	}
	return &Linter{rules: Rules(), full: full, max: o.MaxShapes, shapes: map[shape]*verdict{}}, nil
}

// Lint says how a certificate made from the template under the issuer would break a rule; the error names the lint and
// its citation. Nothing of a shape that has not passed the full set gets nil.
func (l *Linter) Lint(ctx context.Context, template, issuer *x509.Certificate, profile string) error {
	for i := range l.rules {
		if err := l.rules[i].Check(template, issuer); err != nil {
			return fmt.Errorf("%s (%s): %w", l.rules[i].Name, l.rules[i].Citation, err)
		}
	}
	return l.lintShape(ctx, template, issuer, profile)
}

// lintShape runs the full set unless the shape has passed it. Of those that bring a new shape at once, one lints and
// the others wait. A shape that failed is not remembered: what failed may have been a value.
func (l *Linter) lintShape(ctx context.Context, template, issuer *x509.Certificate, profile string) error {
	s := shapeOf(template, issuer, profile)
	l.mu.Lock()
	v, known := l.shapes[s]
	if !known {
		if len(l.shapes) >= l.max {
			clear(l.shapes)
		}
		v = &verdict{done: make(chan struct{}), err: errUnfinished}
		l.shapes[s] = v
	}
	l.mu.Unlock()

	if known {
		select {
		case <-v.done:
			return v.err
		default:
		}
		select {
		case <-v.done:
			return v.err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	defer l.settle(s, v) // deferred: a panic too must not leave the shape refused for all who come later
	v.err = l.full.lint(template, issuer)
	return v.err
}

func (l *Linter) settle(s shape, v *verdict) {
	if v.err != nil {
		l.mu.Lock()
		if l.shapes[s] == v {
			delete(l.shapes, s)
		}
		l.mu.Unlock()
	}
	close(v.done)
}
