package files

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// rotations is how many of both sides each peer must go through at least.
const rotations = 5

// TestPeersUnderRotation: a stock nginx, a stock HAProxy and gRPC serve mTLS from files, with a handshake for every request.
// Their certificates and their clients' are replaced again and again, and the root once: no request may fail.
func TestPeersUnderRotation(t *testing.T) {
	s := newSite(t)
	first := s.deliveries()[0].GetBundleSequence()
	all := []*traffic{s.grpcTraffic()}
	for name, start := range map[string]func(path string){"nginx": s.startNginx, "haproxy": s.startHAProxy} {
		path := s.daemon(name)
		if path == "" {
			t.Logf("NOT TESTED WITH %s: it is not installed. CI installs it; here: apt-get install --no-install-recommends %s", strings.ToUpper(name), name)
			continue
		}
		start(path)
		all = append(all, s.tlsTraffic(name))
	}
	ctx, end := context.WithCancel(t.Context())
	var running sync.WaitGroup
	for _, r := range all {
		running.Go(func() { r.run(ctx) })
	}
	defer func() { end(); running.Wait() }()
	s.rotateRoot()
	for _, r := range all {
		for limit := time.Now().Add(10 * ttl); ; time.Sleep(100 * time.Millisecond) {
			servers, clients, _, failed := r.count()
			if servers > rotations && clients > rotations || len(failed) > 0 {
				break
			}
			if time.Now().After(limit) {
				t.Fatalf("%s: %d certificates of the server and %d of the client were seen", r.name, servers, clients)
			}
		}
	}
	end()
	running.Wait()
	for _, r := range all {
		r.expect(t, rotations)
	}
	for _, d := range s.deliveries() {
		told := d.GetAfter() == "" || d.GetAfterAt() != nil || s.daemon("nginx") == "" || s.daemon("haproxy") == ""
		if d.GetWrittenAt() == nil || d.GetFault() != "" || !told || d.GetBundleSequence() < first+2 {
			t.Errorf("the agent shows %v", d)
		}
	}
}

// listens waits until the port takes connections.
func listens(port string) func(context.Context) error {
	return func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", "127.0.0.1:"+port)
		if err != nil {
			return err
		}
		return conn.Close()
	}
}

func (s *site) startNginx(path string) {
	s.t.Helper()
	s.write("nginx-mtls.conf", s.example("nginx.conf"))
	user := ""
	if os.Geteuid() == 0 {
		user = "user root;\n" // its workers log into the test's directory
	}
	main := s.write("nginx-main.conf", user+fmt.Sprintf(`daemon off;
pid %[1]s/nginx.pid;
error_log stderr warn;
worker_processes 2;
events {}
http {
    access_log off;
    client_body_temp_path %[1]s/nginx-1; proxy_temp_path %[1]s/nginx-2; fastcgi_temp_path %[1]s/nginx-3; uwsgi_temp_path %[1]s/nginx-4; scgi_temp_path %[1]s/nginx-5;
    include %[1]s/nginx-mtls.conf;
}
`, s.dir))
	s.await(s.run(path, "-c", main), listens(s.ports["nginx"]))
}

func (s *site) startHAProxy(path string) {
	s.t.Helper()
	config := s.write("haproxy.cfg", s.example("haproxy.cfg"))
	s.await(s.run(path, "-W", "-f", config, "-p", s.file("haproxy.pid")), listens(s.ports["haproxy"]))
}
