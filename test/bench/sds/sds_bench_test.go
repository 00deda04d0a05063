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
	connections = 1000 // with one stream each
	pushes      = 6    // before memory is read
	timed       = 20   // more of them, for the time of a push
	rounds      = 3    // of both servers, in turns
)

// BenchmarkPush has each server hold 1000 connections and rotate one secret of 2.5 KiB under all of them. It reports
// the medians of both and their ratios: memory is the server's whole resident set after six pushes, a push takes from
// the rotation until the last of the 1000 clients has the new secret and all have acknowledged the one before.
func BenchmarkPush(b *testing.B) {
	for range b.N {
		memory, push := map[string][]float64{}, map[string][]float64{}
		for range rounds {
			for _, kind := range []string{bare, meshca} {
				m, p := measure(b, kind)
				memory[kind] = append(memory[kind], m)
				push[kind] = append(push[kind], p...)
			}
		}
		b.ReportMetric(median(memory[meshca]), "KiB")
		b.ReportMetric(median(memory[bare]), "floor-KiB")
		b.ReportMetric(median(memory[meshca])/median(memory[bare]), "memory-ratio")
		b.ReportMetric(median(push[meshca]), "ms/push")
		b.ReportMetric(median(push[bare]), "floor-ms/push")
		b.ReportMetric(median(push[meshca])/median(push[bare]), "push-ratio")
	}
}

// measure runs one server with all its clients: its resident set in KiB after the first pushes, and the milliseconds
// that each later push took.
func measure(b *testing.B, kind string) (memory float64, push []float64) {
	b.Helper()
	c := startChild(b, kind)
	defer c.stop()
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	got := make(chan error, connections)
	for range connections {
		connect(b, ctx, c.socket, got)
	}
	await(b, got)
	for range pushes {
		c.rotate(b, got)
	}
	memory = c.resident(b)
	for range timed {
		start := time.Now()
		c.rotate(b, got)
		push = append(push, float64(time.Since(start).Microseconds())/1000)
	}
	return memory, push
}

// connect opens a connection of its own with one stream, which says on got that a secret came, and acknowledges it.
func connect(b *testing.B, ctx context.Context, socket string, got chan<- error) {
	b.Helper()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = conn.Close() })
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
}

// await waits until every client has one more secret.
func await(b *testing.B, got <-chan error) {
	b.Helper()
	late := time.After(time.Minute)
	for range connections {
		select {
		case err := <-got:
			if err != nil {
				b.Fatal(err)
			}
		case <-late:
			b.Fatal("not every client got its secret within a minute")
		}
	}
}

// child is a server in a process of its own.
type child struct {
	socket string
	cmd    *exec.Cmd
	in     io.WriteCloser
}

func startChild(b *testing.B, kind string) *child {
	b.Helper()
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	c := &child{socket: filepath.Join(b.TempDir(), "s"), cmd: exec.Command(self)}
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

// rotate has the server rotate, and waits until all clients have it.
func (c *child) rotate(b *testing.B, got <-chan error) {
	b.Helper()
	if _, err := io.WriteString(c.in, "push\n"); err != nil {
		b.Fatal(err)
	}
	await(b, got)
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
