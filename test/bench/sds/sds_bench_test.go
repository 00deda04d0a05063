// Package sds measures the SDS engine against the floor of the machine that it runs on: a bare grpc-go stream server in
// the same run, under the same clients. See floor in server_test.go for what that one does.
package sds

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/meshca/meshca/api/sds"
)

const (
	connections = 1000 // to each server, with one stream each
	pushes      = 6    // before memory is read
	timed       = 40   // more of them, for the time of a push
	rounds      = 3    // of new servers
)

// BenchmarkPush has two servers hold 1000 connections each and rotate one secret of 2.5 KiB under all of them. It
// reports the medians of both and their ratios: memory is a server's whole resident set after six pushes, a push takes
// from the rotation until all of the 1000 clients have the new secret. The servers push in turns, so that whatever else
// the machine does meets both.
func BenchmarkPush(b *testing.B) {
	for range b.N {
		memory, push := map[string][]float64{}, map[string][]float64{}
		for range rounds {
			measure(b, memory, push)
		}
		b.ReportMetric(median(memory[meshca]), "KiB")
		b.ReportMetric(median(memory[bare]), "floor-KiB")
		b.ReportMetric(median(memory[meshca])/median(memory[bare]), "memory-ratio")
		b.ReportMetric(median(push[meshca]), "ms/push")
		b.ReportMetric(median(push[bare]), "floor-ms/push")
		b.ReportMetric(median(push[meshca])/median(push[bare]), "push-ratio")
	}
}

// measure runs both servers with all their clients once. It adds their resident sets in KiB after the first pushes, and
// the milliseconds that each later push took.
func measure(b *testing.B, memory, push map[string][]float64) {
	b.Helper()
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	kinds := []string{bare, meshca}
	children := map[string]*child{}
	for _, kind := range kinds {
		c := startChild(b, kind)
		defer c.stop()
		for range connections {
			conn := connect(b, ctx, c.socket, c.got)
			defer conn.Close()
		}
		c.await(b)
		for range pushes {
			c.rotate(b)
		}
		memory[kind] = append(memory[kind], c.resident(b))
		children[kind] = c
	}
	for range timed {
		slices.Reverse(kinds)
		for _, kind := range kinds {
			start := time.Now()
			children[kind].rotate(b)
			push[kind] = append(push[kind], float64(time.Since(start).Microseconds())/1000)
		}
	}
}

// connect opens a connection of its own with one stream, which says on got that a secret came, and acknowledges it.
func connect(b *testing.B, ctx context.Context, socket string, got chan<- error) *grpc.ClientConn {
	b.Helper()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	s, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx)
	if err != nil {
		b.Fatal(err)
	}
	r := &discoveryv3.DiscoveryRequest{
		Node: &corev3.Node{Id: "bench", Cluster: "bench"}, TypeUrl: sds.TypeURL, ResourceNames: []string{sds.NameDefault},
	}
	if err := s.Send(r); err != nil {
		b.Fatal(err)
	}
	go func() {
		for {
			m, err := s.Recv()
			if err != nil {
				if ctx.Err() == nil {
					got <- err
				}
				return
			}
			if n := len(m.GetResources()[0].GetValue()); n < 2200 || n > 2800 {
				got <- fmt.Errorf("the secret has %d bytes, want about 2.5 KiB", n)
				return
			}
			got <- s.Send(&discoveryv3.DiscoveryRequest{
				VersionInfo: m.GetVersionInfo(), ResponseNonce: m.GetNonce(), TypeUrl: sds.TypeURL, ResourceNames: r.ResourceNames,
			})
		}
	}()
	return conn
}

// child is a server in a process of its own.
type child struct {
	socket string
	cmd    *exec.Cmd
	in     io.WriteCloser
	// got has an entry for each secret that a client received.
	got chan error
}

func startChild(b *testing.B, kind string) *child {
	b.Helper()
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	c := &child{socket: filepath.Join(b.TempDir(), "s"), cmd: exec.Command(self), got: make(chan error, connections)}
	c.cmd.Env = append(os.Environ(), childServer+"="+kind, childSocket+"="+c.socket)
	c.cmd.Stderr = os.Stderr
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		b.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		b.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		b.Fatalf("the %s server said %q: %v", kind, line, err)
	}
	return c
}

// await waits until every client has one more secret.
func (c *child) await(b *testing.B) {
	b.Helper()
	late := time.After(time.Minute)
	for range connections {
		select {
		case err := <-c.got:
			if err != nil {
				b.Fatal(err)
			}
		case <-late:
			b.Fatal("not every client got its secret within a minute")
		}
	}
}

// rotate has the server rotate, and waits until all clients have it.
func (c *child) rotate(b *testing.B) {
	b.Helper()
	if _, err := io.WriteString(c.in, "push\n"); err != nil {
		b.Fatal(err)
	}
	c.await(b)
}

// resident is VmRSS in KiB (proc(5)).
func (c *child) resident(b *testing.B) float64 {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.cmd.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			if err != nil {
				b.Fatal(err)
			}
			return n
		}
	}
	b.Fatal("the kernel tells no VmRSS")
	return 0
}

// stop closes the server's input, at which it ends.
func (c *child) stop() {
	_ = c.in.Close()
	_ = c.cmd.Wait()
}

func median(values []float64) float64 {
	values = slices.Sorted(slices.Values(values))
	return values[len(values)/2]
}
