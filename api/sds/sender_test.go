package sds

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/rotation"
)

// faulty is the wire of a peer that asks once; a fault of ours is in what reads or sends.
type faulty struct {
	ctx     context.Context
	asked   chan *request
	reading bool
}

func (w *faulty) receive() (*request, error) {
	select {
	case r := <-w.asked:
		return r, nil
	default:
	}
	if w.reading {
		panicsHere()
	}
	<-w.ctx.Done()
	return nil, w.ctx.Err()
}

func (w *faulty) send(proto.Message) error { panicsHere(); return nil }

func (w *faulty) encode(*answer) proto.Message { return &discoveryv3.DiscoveryResponse{} }

func panicsHere() { panic("a-token-in-a-panic") }

// A stream's helpers have goroutines of their own, where a panic would end the process. It must come up in the stream's
// goroutine, where the server's interceptors are, and with the stack of where it happened.
func TestFaultsComeUpInTheStreamsGoroutine(t *testing.T) {
	for _, reading := range []bool{false, true} {
		t.Run(fmt.Sprint("reading ", reading), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			var closed []error
			current := rotation.NewCurrent(fixture().first)
			server, err := New(Config{
				Source:  func(context.Context) (Source, error) { return SourceFunc(current.Get), nil },
				Observe: Observe{Closed: func(_ Stream, _ bool, err error) { closed = append(closed, err) }},
			})
			if err != nil {
				t.Fatal(err)
			}
			w := &faulty{ctx: ctx, asked: make(chan *request, 1), reading: reading}
			if !reading {
				// Enough of them that the answer goes out from a goroutine of its own.
				r := &request{}
				for i := range 2000 {
					r.names = append(r.names, fmt.Sprint("nobody-", i))
				}
				w.asked <- r
			}
			raised := func() (value any) {
				defer func() { value = recover() }()
				return server.serve(ctx, Delta, w)
			}()
			f, ok := raised.(*fault)
			if !ok || strings.Contains(f.Error(), "a-token-in-a-panic") || !strings.HasPrefix(refusal.Panicked(f), "string\n") || !strings.Contains(f.Error(), "panicsHere") {
				t.Errorf("the stream's goroutine had %v", raised)
			}
			if len(closed) != 1 || !errors.Is(closed[0], errPanicked) {
				t.Errorf("told as closed: %v", closed)
			}
			if len(server.streams.open) != 0 {
				t.Error("the stream is still counted")
			}
		})
	}
}
