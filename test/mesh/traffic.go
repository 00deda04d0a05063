package mesh

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Traffic is a steady stream of requests. Each goes to the client's Envoy in the clear, and from there over a
// connection of its own to the server's Envoy, so each one needs a handshake that both sides accept. Its methods are
// safe for concurrent use.
type Traffic struct {
	url string
	// want is what the service answers when it saw the right client.
	want   string
	client *http.Client

	ok, failed atomic.Int64
	mu         sync.Mutex
	lastFault  string // guarded by mu
}

const (
	// requestTimeout makes a request that hangs a failed one. It is well above what a machine that is busy with
	// other things needs for maxOpen handshakes: waiting for a turn is no fault of a certificate.
	requestTimeout = 20 * time.Second
	// maxOpen bounds the requests under way: a stream that stalls gets slow, it does not pile up.
	maxOpen = 32
)

// NewTraffic makes the stream of requests to url that expects want as the body of every answer.
func NewTraffic(url, want string) *Traffic {
	return &Traffic{url: url, want: want, client: &http.Client{
		Timeout:   requestTimeout,
		Transport: &http.Transport{MaxIdleConnsPerHost: maxOpen},
	}}
}

// Run sends rate requests a second until ctx ends, and returns when the last of them has its answer: those under way
// are not cut off, so that ending the demo never looks like a fault. What a busy machine held up is sent at once after.
func (t *Traffic) Run(ctx context.Context, rate int) {
	var open sync.WaitGroup
	defer t.client.CloseIdleConnections()
	defer open.Wait()
	places := make(chan struct{}, maxOpen)
	begin := time.Now()
	wait := time.NewTimer(0)
	defer wait.Stop()
	for sent := 1; ; sent++ {
		select {
		case <-ctx.Done():
			return
		case <-wait.C:
		}
		select {
		case <-ctx.Done():
			return
		case places <- struct{}{}:
		}
		open.Go(func() {
			defer func() { <-places }()
			t.count(t.once(context.WithoutCancel(ctx)))
		})
		wait.Reset(time.Until(begin.Add(time.Duration(float64(sent) / float64(rate) * float64(time.Second)))))
	}
}

// once makes one request and says what was wrong with its answer.
func (t *Traffic) once(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.url, nil)
	if err != nil {
		return err
	}
	resp, err := t.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	if err != nil {
		return err
	}
	got := strings.TrimSpace(string(body))
	switch {
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("%s: %s", resp.Status, got)
	case got != t.want:
		return fmt.Errorf("the service answered %q, want %q", got, t.want)
	}
	return nil
}

func (t *Traffic) count(err error) {
	if err == nil {
		t.ok.Add(1)
		return
	}
	t.failed.Add(1)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lastFault = time.Now().Format(time.TimeOnly) + " " + err.Error()
}

// OK is how many requests were answered as they should be.
func (t *Traffic) OK() int64 { return t.ok.Load() }

// Failed is how many were not.
func (t *Traffic) Failed() int64 { return t.failed.Load() }

// Fault is what was wrong with the last request that failed, and when.
func (t *Traffic) Fault() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.lastFault
}
