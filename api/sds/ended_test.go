package sds

import (
	"context"
	"encoding/binary"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/meshca/meshca/api/refusal"
)

// onWire is a request as gRPC writes it.
func onWire(t *testing.T, r *discoveryv3.DiscoveryRequest) []byte {
	t.Helper()
	body, err := proto.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body))), body...)
}

// Who ends a stream himself is gone, or knows what he does. Whose stream was ended otherwise is told as cut off: he may come
// back.
func TestWhoEndedAStream(t *testing.T) {
	stream := func(t *testing.T, d *door) func() {
		ctx, cancel := context.WithCancel(t.Context())
		s, err := d.client.StreamSecrets(ctx)
		if err == nil {
			err = s.Send(ask(NameRootCA))
		}
		if err != nil {
			t.Fatal(err)
		}
		d.one()
		return cancel
	}
	for name, c := range map[string]struct {
		end func(t *testing.T, d *door)
		cut bool
	}{
		"the peer resets it":              {func(t *testing.T, d *door) { stream(t, d)() }, false},
		"the peer closes its side":        {func(t *testing.T, d *door) { p := d.sotw(); p.say(ask(NameRootCA)); _ = p.half() }, false},
		"the peer closes the connection":  {func(t *testing.T, d *door) { stream(t, d); _ = d.conn.Close() }, false},
		"the peer set a time for it":      {func(t *testing.T, d *door) { d.timed(t); time.Sleep(time.Minute) }, false},
		"it is refused":                   {func(t *testing.T, d *door) { stream(t, d); d.source.Set(End(refusal.New(refusal.IdentityDenied, ""))) }, true},
		"a request is too large":          {func(t *testing.T, d *door) { d.sotw().say(ask(strings.Repeat("x", 20_000))) }, true},
		"the peer gives no sign of life":  {func(t *testing.T, d *door) { d.raw(onWire(t, ask(NameRootCA))); time.Sleep(2 * time.Minute) }, true},
		"a request does not arrive whole": {func(t *testing.T, d *door) { d.raw(onWire(t, ask(NameRootCA)), []byte{0, 0}); time.Sleep(time.Minute) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			withDoor(t, func(c *Config) { c.Limits.RequestBytes, c.Limits.LargeRequestBytes = 5_000, 10_000 }, func(t *testing.T, d *door) {
				c.end(t, d)
				synctest.Wait()
				if len(d.closed) != 1 || d.cut != c.cut {
					t.Errorf("closed with %v; cut: %t", d.closed, d.cut)
				}
			})
		})
	}
}

// timed opens a stream that is to end in half a minute.
func (d *door) timed(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	s, err := d.client.StreamSecrets(ctx)
	if err == nil {
		err = s.Send(ask(NameRootCA))
	}
	if err != nil {
		t.Fatal(err)
	}
}
