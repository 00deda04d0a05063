package csi

import (
	"context"
	"log/slog"
	"sync"

	registrationv1 "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/meshca/meshca/api/refusal"
)

// registrar answers the kubelet's plugin watcher, which finds drivers by their sockets in its registration directory.
type registrar struct {
	registrationv1.UnsafeRegistrationServer

	config Config
	log    *slog.Logger
	kept   *registration
}

var _ registrationv1.RegistrationServer = (*registrar)(nil)

// registration is how far the kubelet has got with the driver.
type registration struct {
	mu         sync.Mutex
	sockets    map[string]error // why those are not open that are not
	told       bool             // the kubelet has said how it went
	registered bool
	why        string
}

// csiVersions are what kubelets take for a driver of CSI 1.x.
var csiVersions = []string{"1.0.0"}

// GetInfo says what is to be registered, and where its CSI socket is: the path is the kubelet's, too.
func (s *registrar) GetInfo(context.Context, *registrationv1.InfoRequest) (*registrationv1.PluginInfo, error) {
	return &registrationv1.PluginInfo{
		Type: registrationv1.CSIPlugin, Name: s.config.Name, Endpoint: s.config.Socket, SupportedVersions: csiVersions,
	}, nil
}

// NotifyRegistrationStatus is how it went.
func (s *registrar) NotifyRegistrationStatus(_ context.Context, r *registrationv1.RegistrationStatus) (*registrationv1.RegistrationStatusResponse, error) {
	why := refusal.Clip(r.GetError(), 512)
	s.kept.mu.Lock()
	s.kept.told, s.kept.registered, s.kept.why = true, r.GetPluginRegistered(), why
	s.kept.mu.Unlock()
	if r.GetPluginRegistered() {
		s.log.Info("the kubelet has registered the CSI driver", "driver", s.config.Name)
	} else {
		s.log.Error("the kubelet does not register the CSI driver; it tries again", "driver", s.config.Name, "why", why)
	}
	return &registrationv1.RegistrationStatusResponse{}, nil
}

// open notes whether a socket is open.
func (r *registration) open(path string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.sockets == nil {
		r.sockets = make(map[string]error)
	}
	if r.sockets[path] = err; err == nil {
		delete(r.sockets, path)
	}
}

// standing is why the kubelet cannot hand volumes to the driver now; nil: it can.
func (r *registration) standing(c Config) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, path := range []string{c.Socket, c.registrationSocket()} {
		if err := r.sockets[path]; err != nil {
			return err
		}
	}
	switch {
	case r.registered:
		return nil
	case r.told:
		return refusal.New(refusal.KubeletUnregistered, "the kubelet says: %s", r.why)
	}
	return refusal.New(refusal.KubeletUnregistered, "the kubelet has not called at %s yet", c.registrationSocket())
}
